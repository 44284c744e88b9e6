# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bodies of requests are checked before anything looks into them, as Prism does it: types, enums, lengths, what is required,
and nothing that is not in the schema. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from replicator.simulator.web import HttpError

#: A check of a value: raises InvalidError with where it stands.
Shape = Callable[[Any, str], None]

UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_IPV4 = re.compile(r"(\d{1,3}\.){3}\d{1,3}")
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")
_ITEMS_MAX = 4096
_TEXT_MAX = 64 << 10


class InvalidError(HttpError):
    """422, with v3's own word for the reason."""

    def __init__(self, message: str, v3_reason: str = "INVALID_REQUEST") -> None:
        super().__init__(422, message, "invalid")
        self.v3_reason = v3_reason


def text(
    longest: int = _TEXT_MAX,
    *,
    shortest: int = 0,
    one_of: tuple[str, ...] = (),
    form: re.Pattern[str] | None = None,
) -> Shape:
    """A string of these lengths, one of these, of this form."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str):
            raise InvalidError(f"{where}: {_short(value)} is not of type 'string'")
        if one_of and value not in one_of:
            raise InvalidError(f"{where}: {_short(value)} is not one of {list(one_of)}")
        if not shortest <= len(value) <= longest:
            raise InvalidError(
                f"{where}: {_short(value)} has not {shortest} to {longest} characters"
            )
        if form is not None and form.fullmatch(value) is None:
            raise InvalidError(f"{where}: {_short(value)} does not match '{form.pattern}'")

    return check


def whole(least: int = -(1 << 63), most: int = (1 << 63) - 1) -> Shape:
    """An integer; never a string or a boolean."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int:
            raise InvalidError(f"{where}: {_short(value)} is not of type 'integer'")
        if not least <= value <= most:
            raise InvalidError(f"{where}: {value} is not between {least} and {most}")

    return check


def boolean(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise InvalidError(f"{where}: {_short(value)} is not of type 'boolean'")


def anything(value: Any, where: str) -> None:
    """An object that nothing here looks into."""
    if not isinstance(value, dict):
        raise InvalidError(f"{where}: {_short(value)} is not of type 'object'")


uuid = text(36, form=UUID)
moment = text(64, form=_TIME)
ipv4 = text(15, form=_IPV4)
mac = text(17, form=_MAC)


def many(shape: Shape, most: int = _ITEMS_MAX) -> Shape:
    """A list of these."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise InvalidError(f"{where}: {_short(value)} is not of type 'array'")
        if len(value) > most:
            raise InvalidError(f"{where}: more than {most} items")
        for index, item in enumerate(value):
            shape(item, f"{where}[{index}]")

    return check


def mapping(shape: Shape) -> Shape:
    """An object with any keys and values of this shape."""

    def check(value: Any, where: str) -> None:
        anything(value, where)
        for key, item in value.items():
            shape(item, f"{where}.{key}")

    return check


def record(**fields: Shape) -> Shape:
    """An object with these fields and no others; ``_`` at the end of a name says that it is required."""
    required = {name[:-1] for name in fields if name.endswith("_")}
    known: Mapping[str, Shape] = {name.removesuffix("_"): shape for name, shape in fields.items()}

    def check(value: Any, where: str) -> None:
        anything(value, where)
        for name in sorted(required - value.keys()):
            raise InvalidError(f"{where}: '{name}' is a required property", "MISSING_ATTRIBUTE")
        for name, item in value.items():
            shape = known.get(name)
            if shape is None:
                raise InvalidError(
                    f"{where}: additional properties are not allowed ({_short(name)} was unexpected)"
                )
            shape(item, f"{where}.{name}" if where else name)

    return check


def check(value: Any, shape: Shape) -> Any:
    """The body, checked. Raises InvalidError (422)."""
    if value is None or value == {}:
        # Prism says the same for no body and for an empty one, where something is required.
        value = {}
    shape(value, "body")
    return value


def check_uuid(value: str) -> str:
    """An id out of a path. Raises HttpError 422 (INVALID_UUID)."""
    if UUID.fullmatch(value) is None:
        raise InvalidError(f"{_short(value)} is not a valid UUID", "INVALID_UUID")
    return value.lower()


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
