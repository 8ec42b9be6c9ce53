"""YAML files and `key=value` overrides as dataclasses, strictly. Imports no torch.

An unknown, repeated or wrongly typed key is an error with file, line and the nearest known key. Types come from the
dataclasses, so `2e-4` is a float; words that YAML takes for something else (`off`, `016`), aliases and tags are errors.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.errors import UserError
from common.words import nearest

import yaml

DEEPEST = 20  # sections and lists inside each other; the deepest key of a configuration is at 2
LONGEST = 80  # characters that a message quotes, so that it stays on a line
DIGITS = 18  # of a whole number: fits 64 bits
T = TypeVar("T")


def read(cls: type[T], path: Path | None, overrides: typing.Iterable[str] = ()) -> T:
    """A YAML file as a `cls`, with `key=value` overrides; without a file, what the overrides make.

    Raises `UserError` with file and line (or the override) of what is wrong first, or a `__post_init__` refuses.
    """
    tree = _read(path) if path else {}
    for override in overrides:
        _override(tree, override)
    return _build(cls, tree, "", str(path or "overrides"), known_keys(cls))


def of_dict(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """A JSON object as a `cls`, as strictly as a file. Raises `UserError`, which begins with `source`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: leaf(inner) for key, inner in value.items()}
        node = yaml.compose(json.dumps(value))
        assert node  # of any JSON there is one
        return _Leaf(node, source)

    return _build(cls, leaf(values), "", source, known_keys(cls))


def given_keys(overrides: typing.Iterable[str]) -> set[str]:
    """The dotted keys that `key=value` overrides set."""
    tree: Tree = {}
    for override in overrides:
        _override(tree, override)

    def keys(tree: Tree, prefix: str) -> set[str]:
        inner = (keys(value, f"{prefix}{name}.") for name, value in tree.items() if isinstance(value, dict))
        return {prefix + name for name, value in tree.items() if not isinstance(value, dict)}.union(*inner)

    return keys(tree, "")


# ---- YAML with line numbers: mappings become dicts, everything else a leaf ----------------------------------------


@dataclass(frozen=True)
class _Leaf:
    node: yaml.Node
    where: str  # "file:line", or the override


Tree = dict[str, "_Leaf | Tree"]


class _Loader(yaml.SafeLoader):
    """Plain YAML; an alias, a tag or deep nesting is an error with its line."""

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


def _read(path: Path) -> Tree:
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


def _mapping(node: yaml.MappingNode, prefix: str, source: str) -> Tree:
    out: Tree = {}
    for key, value in node.value:
        where = f"{source}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a key is one word; quote a value that begins with a brace or bracket")
        if key.value in out:
            raise UserError(f'{where}: key "{shown(prefix + key.value)}" stands here twice')
        mapping = isinstance(value, yaml.MappingNode)
        out[key.value] = _mapping(value, f"{prefix}{key.value}.", source) if mapping else _Leaf(value, where)
    return out


def _override(tree: Tree, text: str) -> None:
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


def _build(cls: Any, tree: Tree, prefix: str, source: str, known: list[str]) -> Any:
    hints = _hints(cls)
    sections = [name for name in hints if not prefix]
    for key, value in tree.items():
        if key not in hints:
            near = nearest(prefix + key, [*known, *sections])
            raise UserError(f'{_where(value, source)}: unknown key "{shown(prefix + key)}"{near}')
    values, fields = {}, {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in hints.items():
        if name in tree:
            values[name] = _value(tree[name], hint, prefix + name, source, known)
        elif fields[name].default is fields[name].default_factory is dataclasses.MISSING:
            raise UserError(f'{source}: missing key "{prefix}{name}"')
    try:
        return cls(**values)
    except ValueError as error:
        leaf = tree.get(str(error).partition(":")[0])
        where = leaf.where if isinstance(leaf, _Leaf) else source
        raise UserError(f"{where}: {prefix}{error}") from error


def _value(value: _Leaf | Tree, hint: Any, key: str, source: str, known: list[str]) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    words = [word for choice in choices[1:] for word in typing.get_args(choice)]  # `float | Literal["auto"]`
    (hint,) = [choice for choice in choices if choice is not type(None) and not (words and typing.get_args(choice))]
    if words and isinstance(value, _Leaf) and value.node.value in words:
        return value.node.value
    if isinstance(value, dict):
        if not dataclasses.is_dataclass(hint):
            raise UserError(f'{_where(value, source)}: "{key}" takes a value, not a section')
        return _build(hint, value, key + ".", source, known)
    if type(None) in choices and _tag(value.node) == "null":
        return None
    if dataclasses.is_dataclass(hint):
        first = dataclasses.fields(hint)[0].name
        raise UserError(f'{value.where}: "{key}" is a section; set one of its keys, such as {key}.{first}')
    if typing.get_origin(hint) is tuple:
        if not isinstance(value.node, yaml.SequenceNode):
            raise UserError(f'{value.where}: "{key}" takes a list, such as [a, b]')
        return tuple(_scalar(_Leaf(item, value.where), typing.get_args(hint)[0], key) for item in value.node.value)
    return _scalar(value, hint, key, words)


def _scalar(leaf: _Leaf, hint: Any, key: str, words: typing.Sequence[str] = ()) -> Any:
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
        if hint is float and re.fullmatch(r"[+-]?((0|[1-9][0-9]*)\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
            if math.isinf(float(text)):
                raise UserError(f'{leaf.where}: "{key}" takes a finite number')
            return float(text)
    want = " or ".join(({bool: "true or false", int: "a whole number", float: "a number"}[hint], *words))
    raise UserError(f'{leaf.where}: "{key}" takes {want}, not "{shown(text)}"')


def _whole(text: str, where: str) -> str:
    """`text` with a character above U+FFFF for each pair of surrogates, which is how JSON writes one."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} takes text that UTF-8 can hold") from error


def shown(text: str) -> str:
    """`text` for a message of one line: escaped if it cannot be printed, cut if it is long."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tag(node: yaml.Node) -> str:
    return node.tag.rpartition(":")[2]


def _where(value: _Leaf | Tree | None, source: str) -> str:
    if isinstance(value, dict):
        return _where(next(iter(value.values()), None), source)
    return value.where if value else source


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


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "problem", error))
