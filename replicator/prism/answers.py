# SPDX-License-Identifier: AGPL-3.0-or-later
"""Answers read field by field: what is not there, or of another type, is an error that names the host and the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from replicator.prism.errors import PrismAnswerError

_TEXT_MAX = 4096
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Node:
    """A JSON object of an answer. ``where`` says whose, for errors; ``raw`` is the object itself."""

    __slots__ = ("raw", "where")

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise PrismAnswerError(f"{where}: an object was expected")
        self.raw: dict[str, Any] = raw
        self.where = where

    def has(self, name: str) -> bool:
        """Whether the field is there and is not null."""
        return self.raw.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A text. Without a ``default`` it must be there and not empty."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or len(value) > _TEXT_MAX or (not value and default is None):
            raise self.error(name, "a text")
        return value

    def uuid(self, name: str) -> str:
        """A UUID as text."""
        value = self.text(name)
        if _UUID.fullmatch(value) is None:
            raise self.error(name, "a UUID")
        return value

    def number(
        self, name: str, default: int | None = None, *, low: int = 0, high: int = 1 << 62
    ) -> int:
        """An integer in bounds; digits in a text count as one (some versions send 64-bit numbers so)."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"a number from {low} to {high}")
        return value

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def time_us(self, name: str) -> int:
        """A time as RFC 3339, in microseconds since the epoch."""
        value = self.text(name)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise self.error(name, "a time") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds

    def node(self, name: str) -> Node:
        """An object."""
        value = self.raw.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Node(value, f"{self.where}.{name}")

    def maybe(self, name: str) -> Node | None:
        """An object, or None where it is not there."""
        return self.node(name) if self.has(name) else None

    def nodes(self, name: str) -> list[Node]:
        """A list of objects; empty where it is not there."""
        return list(self._items(name))

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is not there."""
        value = self.raw.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "a list of texts")
        return value

    def _items(self, name: str) -> Iterator[Node]:
        value = self.raw.get(name)
        if value is None:
            return
        if not isinstance(value, list):
            raise self.error(name, "a list")
        for index, item in enumerate(value):
            yield Node(item, f"{self.where}.{name}[{index}]")

    def error(self, name: str, expected: str) -> PrismAnswerError:
        """The error that says that this field is not as expected."""
        return PrismAnswerError(f"{self.where}.{name}: {expected} was expected")
