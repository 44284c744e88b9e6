# SPDX-License-Identifier: AGPL-3.0-or-later
"""OData as v4's lists take it: ``$filter``, ``$orderby``, ``$select``. What names no property of the model is refused.

Enums are written ``Namespace.Module.Type'VALUE'``, strings and UUIDs in single quotes, times bare, as RFC 3339 has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from replicator.simulator.v4.schema import Field, Schema
from replicator.simulator.web import HttpError

_LENGTH = 8192
_DEPTH = 32
_TOKEN = re.compile(
    r"\s*(?:(?P<enum>[A-Za-z_][\w.]*'[^']*')|(?P<string>'(?:[^']|'')*')"
    r"|(?P<time>\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d))|(?P<number>-?\d+(?:\.\d+)?)"
    r"|(?P<name>[A-Za-z_$]\w*(?:/[A-Za-z_]\w*)*)|(?P<mark>[(),:]))"
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: bool(a == b),
    "ne": lambda a, b: bool(a != b),
    "gt": lambda a, b: a is not None and b is not None and a > b,
    "ge": lambda a, b: a is not None and b is not None and a >= b,
    "lt": lambda a, b: a is not None and b is not None and a < b,
    "le": lambda a, b: a is not None and b is not None and a <= b,
}
_TEXT: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": str.__contains__,
}

#: What a variable stands for: "" is the entity itself, others come from any() and all().
_Values = dict[str, Any]
Test = Callable[[_Values], bool]
_Scope = dict[str, Field]


def _refuse(message: str) -> NoReturn:
    raise HttpError(400, f"$filter: {message}", "invalid_query")


def seconds(text: str) -> float:
    """A time as v4 writes it, since the epoch. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp()


def compile_filter(text: str, schema: Schema, model: str) -> Callable[[dict[str, Any]], bool]:
    """What an entity must be like. Raises HttpError 400."""
    if len(text) > _LENGTH:
        _refuse("is too long")
    parser = _Parser(text, schema, model)
    test = parser.either({}, 0)
    if parser.peek() is not None:
        _refuse(f"does not go on with {parser.peek()!r}")
    return lambda entity: test({"": entity})


class _Parser:
    """Recursive descent; each method gives a test of the entity."""

    def __init__(self, text: str, schema: Schema, model: str) -> None:
        self._schema = schema
        self._model = model
        self._tokens: list[tuple[str, str]] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                _refuse(f"cannot be read at {text[position : position + 20]!r}")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()
        self._at = 0

    def peek(self) -> str | None:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else None

    def _next(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            _refuse("ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, mark: str) -> None:
        found = self._next()[1]
        if found != mark:
            _refuse(f"wants {mark!r}, not {found!r}")

    def either(self, scope: _Scope, depth: int) -> Test:
        if depth > _DEPTH:
            _refuse("nests too deeply")
        tests = [self._both(scope, depth)]
        while self.peek() == "or":
            self._next()
            tests.append(self._both(scope, depth))
        return lambda values: any(test(values) for test in tests)

    def _both(self, scope: _Scope, depth: int) -> Test:
        tests = [self._single(scope, depth)]
        while self.peek() == "and":
            self._next()
            tests.append(self._single(scope, depth))
        return lambda values: all(test(values) for test in tests)

    def _single(self, scope: _Scope, depth: int) -> Test:
        kind, word = self._next()
        if word == "not":
            if depth > _DEPTH:
                _refuse("nests too deeply")
            inner = self._single(scope, depth + 1)
            return lambda values: not inner(values)
        if word == "(":
            inner = self.either(scope, depth + 1)
            self._expect(")")
            return inner
        if kind != "name":
            _refuse(f"wants a property, not {word!r}")
        if word in _TEXT and self.peek() == "(":
            return self._text(word, scope)
        head, _, last = word.rpartition("/")
        if last in {"any", "all"} and self.peek() == "(":
            return self._every(head, last, scope, depth)
        return self._comparison(word, scope)

    def _text(self, name: str, scope: _Scope) -> Test:
        self._expect("(")
        _, path = self._next()
        read, spec = self._property(path, scope)
        self._expect(",")
        wanted = self._literal(spec, *self._next())
        self._expect(")")
        if not isinstance(wanted, str):
            _refuse(f"{name}() compares strings")
        test = _TEXT[name]
        return lambda values: isinstance(read(values), str) and test(read(values), wanted)

    def _every(self, path: str, word: str, scope: _Scope, depth: int) -> Test:
        self._expect("(")
        read, spec = self._property(path, scope)
        if not spec.many:
            _refuse(f"{path} is no list")
        kind, name = self._next()
        if kind != "name" or "/" in name:
            _refuse(f"{name!r} cannot be a variable")
        self._expect(":")
        inner = self.either({**scope, name: spec}, depth + 1)
        self._expect(")")
        combine = any if word == "any" else all
        return lambda values: combine(inner({**values, name: part}) for part in read(values) or [])

    def _comparison(self, path: str, scope: _Scope) -> Test:
        read, spec = self._property(path, scope)
        operator = self.peek()
        if operator == "in":
            self._next()
            self._expect("(")
            wanted = [self._literal(spec, *self._next())]
            while self.peek() == ",":
                self._next()
                wanted.append(self._literal(spec, *self._next()))
            self._expect(")")
            return lambda values: read(values) in wanted
        if operator in _COMPARE:
            self._next()
            value = self._literal(spec, *self._next())
            compare = _COMPARE[operator]
            return lambda values: compare(read(values), value)
        if spec.kind != "bool":
            _refuse(f"{path} must be compared with something")
        return lambda values: read(values) is True

    def _property(self, path: str, scope: _Scope) -> tuple[Callable[[_Values], Any], Field]:
        parts = path.split("/")
        variable = parts[0] if parts[0] in scope else ""
        names = parts[1:] if variable else parts
        spec: Field | None
        if not variable:
            spec = self._schema.field_at(self._model, names)
        elif not names:
            spec = scope[variable]
        else:
            spec = next(
                filter(
                    None, (self._schema.field_at(name, names) for name in scope[variable].models)
                ),
                None,
            )
        if spec is None:
            _refuse(f"{path!r} is no property to filter on")
        is_time = spec.kind == "time"

        def read(values: _Values) -> Any:
            found = values[variable]
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            return seconds(found) if is_time and isinstance(found, str) else found

        return read, spec

    def _literal(self, spec: Field, kind: str, token: str) -> Any:
        if token in {"null", "true", "false"}:
            return {"null": None, "true": True, "false": False}[token]
        enum = self._schema.models[spec.models[0]] if spec.models else None
        if kind == "enum":
            type_name, _, value = token[:-1].partition("'")
            if enum is None or not enum.values:
                _refuse(f"{spec.name} is no enum")
            if type_name.rpartition(".")[2] != enum.name.rpartition(".")[2]:
                _refuse(f"{spec.name} is of type {enum.name}, not {type_name}")
            if value not in enum.values:
                _refuse(f"{spec.name} has no value {value!r}")
            return value
        if enum is not None and enum.values:
            _refuse(
                f"{spec.name} is compared with {enum.name.rpartition('.')[2]}'VALUE', not {token}"
            )
        if kind == "string" and spec.kind in {"str", "uuid", "task", "mac"}:
            return token[1:-1].replace("''", "'")
        if kind == "time" and spec.kind == "time":
            try:
                return seconds(token)
            except ValueError:
                _refuse(f"{token!r} is no time")
        if kind == "number" and spec.kind == "int":
            return float(token) if "." in token else int(token)
        _refuse(f"{spec.name} cannot be compared with {token}")


def order(entities: list[dict[str, Any]], text: str, schema: Schema, model: str) -> None:
    """Sort in place as ``$orderby`` says; entities without the property come first. Raises HttpError 400."""
    for part in reversed(text.split(",")):
        words = part.split()
        if not 1 <= len(words) <= 2 or words[1:] not in ([], ["asc"], ["desc"]):
            raise HttpError(
                400, f"$orderby: {part.strip()!r} is no property and asc or desc", "invalid_query"
            )
        names = words[0].split("/")
        if schema.field_at(model, names) is None:
            raise HttpError(400, f"$orderby: {words[0]!r} is no property", "invalid_query")
        entities.sort(key=lambda entity: _key(entity, names), reverse=words[1:] == ["desc"])


def _key(entity: Any, names: list[str]) -> tuple[bool, Any]:
    for name in names:
        entity = entity.get(name) if isinstance(entity, dict) else None
    return (entity is not None, entity if isinstance(entity, int | str) else "")


def select(entity: dict[str, Any], text: str, schema: Schema, model: str) -> dict[str, Any]:
    """The entity with what ``$select`` names, and its id. Raises HttpError 400."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if schema.field_at(model, name.split("/")) is None:
            raise HttpError(400, f"$select: {name!r} is no property", "invalid_query")
    wanted = {name.partition("/")[0] for name in names} | {"extId"}
    return {name: value for name, value in entity.items() if name in wanted}
