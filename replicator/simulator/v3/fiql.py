# SPDX-License-Identifier: AGPL-3.0-or-later
"""Filters of lists, in FIQL: ``name==web.*;cluster==x``, where ``;`` is and, ``,`` is or, and ``.*`` stands for anything.

Pure. Nothing of a client's filter is used as a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from replicator.simulator.v3.checks import InvalidError

Attributes = Mapping[str, Any]
Predicate = Callable[[Attributes], bool]

_TERM = re.compile(r"(?P<name>\w+)(?P<operator>==|!=|=lt=|=le=|=gt=|=ge=)(?P<value>[^;,()]*)")
_DEPTH_MAX = 16
_TERMS_MAX = 256


def parse(text: str, known: frozenset[str]) -> Predicate:
    """Whether an entity's attributes pass. Raises InvalidError for what is no filter, or names no ``known`` attribute."""
    if not text.strip():
        return _everything
    reader = _Reader(text.strip(), known)
    found = reader.either(0)
    if reader.at != len(reader.text):
        raise InvalidError(f"filter: cannot be read at {reader.at}: {text[:80]!r}")
    return found


class _Reader:
    def __init__(self, text: str, known: frozenset[str]) -> None:
        self.text = text
        self.at = 0
        self._known = known
        self._terms = 0

    def either(self, depth: int) -> Predicate:
        """Terms with ``,`` between them: the weaker of the two."""
        parts = [self._both(depth)]
        while self._eat(","):
            parts.append(self._both(depth))
        return lambda attributes: any(part(attributes) for part in parts)

    def _both(self, depth: int) -> Predicate:
        parts = [self._one(depth)]
        while self._eat(";"):
            parts.append(self._one(depth))
        return lambda attributes: all(part(attributes) for part in parts)

    def _one(self, depth: int) -> Predicate:
        if self._eat("("):
            if depth >= _DEPTH_MAX:
                raise InvalidError("filter: too deep")
            inner = self.either(depth + 1)
            if not self._eat(")"):
                raise InvalidError("filter: a bracket is not closed")
            return inner
        match = _TERM.match(self.text, self.at)
        self._terms += 1
        if match is None or self._terms > _TERMS_MAX:
            raise InvalidError(f"filter: cannot be read at {self.at}: {self.text[:80]!r}")
        self.at = match.end()
        if match["name"] not in self._known:
            raise InvalidError(
                f"filter: {match['name']} cannot be filtered by; known: {', '.join(sorted(self._known))}"
            )
        return _term(match["name"], match["operator"], match["value"])

    def _eat(self, mark: str) -> bool:
        if self.text.startswith(mark, self.at):
            self.at += len(mark)
            return True
        return False


def _everything(attributes: Attributes) -> bool:
    del attributes
    return True


def _term(name: str, operator: str, value: str) -> Predicate:
    if operator in ("==", "!="):
        wanted = re.compile(
            ".*".join(re.escape(piece) for piece in value.split(".*")), re.IGNORECASE | re.DOTALL
        )
        return lambda attributes: _equal(attributes.get(name), wanted) == (operator == "==")
    try:
        bound = float(value)
    except ValueError:
        raise InvalidError(f"filter: {operator} needs a number, not {value[:40]!r}") from None
    compare: dict[str, Callable[[float], bool]] = {
        "=lt=": lambda number: number < bound,
        "=le=": lambda number: number <= bound,
        "=gt=": lambda number: number > bound,
        "=ge=": lambda number: number >= bound,
    }
    passes = compare[operator]

    def ordered(attributes: Attributes) -> bool:
        found = attributes.get(name)
        return isinstance(found, int | float) and passes(float(found))

    return ordered


def _equal(found: Any, wanted: re.Pattern[str]) -> bool:
    if isinstance(found, list | tuple):
        return any(_equal(each, wanted) for each in found)
    if isinstance(found, bool):
        found = str(found).lower()
    return found is not None and wanted.fullmatch(str(found)) is not None
