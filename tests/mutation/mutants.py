"""Small mutants of a Python file, each one careless edit: mutmut's operators, and a few of our own.

Our own are edits that mutmut does not make: a statement left out, a condition turned round, one side of `and` or `or`
dropped, `min` for `max`. Texts for people are not mutated: strings that hold a space, and the words of an f-string.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.mutation.pragma_handling import IgnoredCode

SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One edit of a file: its line (from 1), the lines it takes away and adds, and the whole file with it."""

    line: int
    was: str
    now: str
    code: str


def mutants(code: str) -> list[Mutant]:
    """Every mutant of `code` that compiles, in the order of lines; the same code twice counts once."""
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = _Visitor(
        [*((kind, _words if make is operator_string else make) for kind, make in mutation_operators), *OPERATORS],
        IgnoredCode(set(), set(), set()),
    )
    wrapper.visit(visitor)
    places, module = wrapper.resolve(PositionProvider), wrapper.module
    begins = [0, *itertools.accumulate(len(line) for line in code.splitlines(keepends=True))]
    found: dict[str, Mutant] = {}
    for mutation in visitor.mutations:
        node, place = mutation.original_node, places[mutation.original_node]
        if isinstance(node, cst.BaseStatement):  # whose code comes with its indentation
            mutated = module.deep_replace(node, mutation.mutated_node).code
        else:  # four to six times as fast
            begin, end = (begins[at.line - 1] + at.column for at in (place.start, place.end))
            mutated = code[:begin] + module.code_for_node(mutation.mutated_node) + code[end:]
        try:
            compile(mutated, "mutant", "exec")
        except SyntaxError:
            continue
        if mutated != code and mutated not in found:
            found[mutated] = Mutant(place.start.line, *_differing(code, mutated), mutated)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _differing(code: str, mutated: str) -> tuple[str, str]:
    """The lines that only one of the two has, each side on one line."""
    a, b = code.splitlines(), mutated.splitlines()
    shorter = min(len(a), len(b))
    begin = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    end = next((i for i in range(shorter - begin) if a[-1 - i] != b[-1 - i]), shorter - begin)
    was, now = (" ".join(line.strip() for line in side[begin : len(side) - end]) for side in (a, b))
    return was, now


class _Visitor(MutationVisitor):
    """mutmut's, in decorated functions and class bodies too: nothing is imported twice here."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        return isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom)


def _words(node: cst.BaseString) -> Iterator[cst.CSTNode]:
    if isinstance(node, cst.SimpleString) and " " not in node.value:
        yield from list(operator_string(node))[:1]


def _left_out(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """A statement that is a call, an assignment with an operator, or one to an attribute or item."""
    (statement, *others) = node.body
    alone = m.Expr(m.Call()) | m.Expr(m.Yield()) | m.AugAssign() | m.Raise() | m.Continue() | m.Break()
    stored = m.Assign(targets=[m.AssignTarget(m.Attribute() | m.Subscript())])
    if not others and m.matches(statement, alone | stored):
        yield node.with_changes(body=[cst.Pass()])


def _turned_round(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def _one_side(node: cst.BooleanOperation) -> Iterator[cst.CSTNode]:
    for side in (node.left, node.right):
        yield side.with_changes(lpar=[*node.lpar, *side.lpar], rpar=[*side.rpar, *node.rpar])


def _swapped(node: cst.Call) -> Iterator[cst.CSTNode]:
    if isinstance(node.func, cst.Name) and node.func.value in SWAPPED:
        yield node.with_changes(func=cst.Name(SWAPPED[node.func.value]))


def _one_less(node: cst.Integer) -> Iterator[cst.CSTNode]:
    if node.evaluated_value > 0:
        yield node.with_changes(value=repr(node.evaluated_value - 1))


OPERATORS = [
    (cst.SimpleStatementLine, _left_out),
    (cst.If, _turned_round),
    (cst.While, _turned_round),
    (cst.BooleanOperation, _one_side),
    (cst.Call, _swapped),
    (cst.Integer, _one_less),
]
