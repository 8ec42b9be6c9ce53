"""YAML files and `key=value` overrides as dataclasses, strictly.

An unknown, repeated or wrongly typed key fails with file, line and the nearest known key. Types come from the
dataclasses, not from YAML's guesses, so `2e-4` is a float; where YAML would read a bare word as something else (`off`,
`016`), it is refused rather than guessed. Aliases and tags are refused too: every value stands where it is used.
Imports no torch.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError

import yaml

DEEPEST = 20  # sections and lists inside each other
LONGEST = 80  # characters of what a message quotes
DIGITS = 18  # of a whole number


def read(cls: type, path: Path | None, overrides: typing.Iterable[str] = ()) -> Any:
    """A YAML file as a `cls`, `key=value` overrides over it; without a file, what the overrides make.

    A `ValueError` of a dataclass's own check begins with the key's name, and gets file and line here. Raises
    `UserError` with file and line (or the override) of the first thing that is wrong.
    """
    tree = _read(path) if path else {}
    for override in overrides:
        _override(tree, override)
    return _build(cls, tree, "", str(path or "overrides"), known_keys(cls))


# ---- YAML with line numbers: mappings become dicts, everything else a leaf ----------------------------------------


@dataclass(frozen=True)
class _Leaf:
    node: yaml.Node
    where: str  # "file:line", or the override


class _Loader(yaml.SafeLoader):
    """Nodes of plain YAML; an alias, a tag or deep nesting is an error with its line."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{shown(str(event.anchor))} is an alias; write the value itself"
        elif event.tag:
            problem = f"{shown(event.tag)} is a tag; write the value alone"
        elif self.depth == DEEPEST:
            problem = f"nested more than {DEEPEST} deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read(path: Path) -> dict[str, Any]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}:{mark.line + 1 if mark else '?'}: not valid YAML ({_reason(error)})") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected `key: value` lines")
    return _mapping(root, "", str(path))


def _mapping(node: yaml.MappingNode, prefix: str, source: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in node.value:
        where = f"{source}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a key is one word; quote a value that begins with a brace or bracket")
        if key.value in out:
            raise UserError(f'{where}: key "{shown(prefix + key.value)}" stands here twice')
        out[key.value] = (
            _mapping(value, f"{prefix}{key.value}.", source)
            if isinstance(value, yaml.MappingNode)
            else _Leaf(value, where)
        )
    return out


def _override(tree: dict[str, Any], text: str) -> None:
    where = f"override {shown(text)}"
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f'"{shown(text)}": an override looks like train.lr=1e-4')
    if key.count(".") >= DEEPEST:
        raise UserError(f"{where}: nested more than {DEEPEST} deep")
    try:
        node = yaml.compose(value, Loader=_Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({_reason(error)})") from error
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):  # absent, or `lora: null` in the file
            inner = tree[section] = {}
        tree = inner
    tree[name] = _mapping(node, key + ".", where) if isinstance(node, yaml.MappingNode) else _Leaf(node, where)


# ---- dicts of leaves into dataclasses ------------------------------------------------------------------------------


def _build(cls: Any, tree: dict[str, Any], prefix: str, source: str, known: list[str]) -> Any:
    hints = _hints(cls)
    sections = [name for name in hints if not prefix]
    for key, value in tree.items():
        if key not in hints:
            where = value.where if isinstance(value, _Leaf) else _first_where(value, source)
            near = nearest(prefix + key, [*known, *sections])
            raise UserError(f'{where}: unknown key "{shown(prefix + key)}"{near}')
    values, fields = {}, {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in hints.items():
        if name in tree:
            values[name] = _value(tree[name], hint, prefix + name, source, known)
        elif fields[name].default is fields[name].default_factory is dataclasses.MISSING:
            raise UserError(f'{source}: missing key "{prefix}{name}"')
    try:
        return cls(**values)
    except ValueError as error:
        key = str(error).partition(":")[0]
        where = tree[key].where if isinstance(tree.get(key), _Leaf) else source
        raise UserError(f"{where}: {prefix}{error}") from error


def _value(value: Any, hint: Any, key: str, source: str, known: list[str]) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in choices
    (hint,) = [choice for choice in choices if choice is not type(None)]
    if isinstance(value, dict):
        if not dataclasses.is_dataclass(hint):
            raise UserError(f'{_first_where(value, source)}: "{key}" takes a value, not a section')
        return _build(hint, value, key + ".", source, known)
    if optional and _tag(value.node) == "null":
        return None
    if dataclasses.is_dataclass(hint):
        raise UserError(
            f'{value.where}: "{key}" is a section; set one of its keys, such as {key}.'
            f"{dataclasses.fields(hint)[0].name}"
        )
    if typing.get_origin(hint) is tuple:
        if not isinstance(value.node, yaml.SequenceNode):
            raise UserError(f'{value.where}: "{key}" takes a list, such as [a, b]')
        return tuple(_scalar(_Leaf(item, value.where), typing.get_args(hint)[0], key) for item in value.node.value)
    return _scalar(value, hint, key)


def _scalar(leaf: _Leaf, hint: Any, key: str) -> Any:
    if not isinstance(leaf.node, yaml.ScalarNode):
        raise UserError(f'{leaf.where}: "{key}" takes one value, not a list')
    text, tag = leaf.node.value, _tag(leaf.node)
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        if text not in words:
            known = ", ".join(words)
            raise UserError(f'{leaf.where}: "{key}" is one of {known}, not "{shown(text)}"{nearest(text, words)}')
        return text
    if hint is str:
        if tag != "str":
            word = shown(text) or "nothing"
            raise UserError(f'{leaf.where}: "{key}" takes a word, and YAML reads {word} as {tag}; quote it')
        return _whole(text, f'{leaf.where}: "{key}"')
    if leaf.node.style is None:  # a plain scalar: numbers and truth values are never quoted
        if hint is bool and text in ("true", "false"):
            return text == "true"
        if hint is int and re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", text):
            if len(text.lstrip("+-")) > DIGITS:
                raise UserError(f'{leaf.where}: "{key}" takes a number of at most {DIGITS} digits')
            return int(text)
        if hint is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
            if math.isinf(float(text)):
                raise UserError(f'{leaf.where}: "{key}" takes a finite number')
            return float(text)
    want = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
    raise UserError(f'{leaf.where}: "{key}" takes {want}, not "{shown(text)}"')


def _whole(text: str, where: str) -> str:
    """A text whose surrogates are in pairs, as JSON writes a character above U+FFFF, with that character."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} takes text that UTF-8 can hold") from error


def shown(text: str) -> str:
    """A text in a message of one line: what cannot be printed is escaped, and a long one is cut."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tag(node: yaml.Node) -> str:
    return node.tag.rpartition(":")[2]


def _first_where(tree: dict[str, Any], source: str) -> str:
    for value in tree.values():
        return value.where if isinstance(value, _Leaf) else _first_where(value, source)
    return source


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def known_keys(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted key that a YAML file or an override may set."""
    keys = []
    for name, hint in _hints(cls).items():
        inner = [h for h in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(h)]
        keys += known_keys(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _reason(error: Any) -> str:
    return error.reason if isinstance(error, yaml.reader.ReaderError) else error.problem


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """What was meant, as the end of a message; nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f' — did you mean "{close[0]}"?' if close else ""
