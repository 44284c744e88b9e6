# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the objects of v4 look like: tables of models, by which bodies are judged and answers are made.

A table is text. A line at the margin opens a model, by its full name (``+`` behind it: extId, links and tenantId as well) or
defines an enum (``name = A B C``). Indented lines are fields: name, kind, then in any order ``low..high`` (a length or a
range), ``/pattern/``, ``!`` (required in bodies) and ``@n`` (first minor that has it). Kinds: str, int, bool, time, uuid, mac,
task, map, any, the name of a model or enum (``~`` is the package of the model it stands in), ``[kind]``, or ``A|B``: one of
several models, which must name itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

UUID = r"[a-fA-F0-9]{8}-[a-fA-F0-9]{4}-[a-fA-F0-9]{4}-[a-fA-F0-9]{4}-[a-fA-F0-9]{12}"
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)"
_TEXT_KINDS = {
    "uuid": (re.compile(UUID), "a UUID"),
    "mac": (re.compile(r"([a-fA-F0-9]{2}:){5}[a-fA-F0-9]{2}"), "a MAC address"),
    "task": (re.compile(r"[a-zA-Z0-9/+]*={0,2}:" + UUID), "a task's id"),
    "time": (re.compile(_TIME), "a time as RFC 3339 has it"),
}
_RANGE = re.compile(r"(\d*)\.\.(\d*)")
#: No body nests deeper than this; what does is refused rather than followed.
_DEPTH = 24
_INT_END = 1 << 63
#: At most so many problems are told in one answer.
_PROBLEMS = 20
_EXTERNAL = ("extId uuid", "links [common.v1.response.ApiLink]", "tenantId uuid")


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a model. ``models`` are full names: one for a plain object or enum, several for one-of."""

    name: str
    kind: str
    models: tuple[str, ...] = ()
    many: bool = False
    low: int | None = None
    high: int | None = None
    pattern: re.Pattern[str] | None = None
    required: bool = False
    since: int = 0


@dataclass(slots=True)
class Model:
    """A model, or an enum if it has ``values``. ``since``: the first minor that knows it."""

    name: str
    since: int = 0
    fields: dict[str, Field] = field(default_factory=dict)
    values: tuple[str, ...] = ()

    @property
    def namespace(self) -> str:
        """Such as ``vmm``; ``common`` for what all share."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a body, and where: ``/disks/0/backingInfo``."""

    path: str
    message: str


class Schema:
    """The models of all namespaces."""

    def __init__(self, *tables: str) -> None:
        self.models: dict[str, Model] = {}
        for table in tables:
            self._read(table)

    def _read(self, table: str) -> None:
        model: Model | None = None
        for line in table.splitlines():
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words = line.split()
            if not line[0].isspace():
                model = Model(words[0], since=next((int(w[1:]) for w in words if w[0] == "@"), 0))
                self.models[model.name] = model
                if "=" in words:
                    model.values = tuple(words[words.index("=") + 1 :])
                for text in _EXTERNAL if "+" in words else ():
                    self._add(model, text.split())
            else:
                assert model is not None, line
                self._add(model, words)

    @staticmethod
    def _add(model: Model, words: list[str]) -> None:
        name, kind, *rest = words
        many = kind.startswith("[")
        kind = kind.strip("[]")
        package = model.name.rpartition(".")[0]
        models = (
            tuple(part.replace("~", package + ".") for part in kind.split("|"))
            if "." in kind or "~" in kind
            else ()
        )
        low = high = pattern = None
        since, required = 0, False
        for word in rest:
            if word == "!":
                required = True
            elif word[0] == "@":
                since = int(word[1:])
            elif word[0] == "/":
                pattern = re.compile(word.strip("/"))
            else:
                match = _RANGE.fullmatch(word)
                assert match is not None, (model.name, words)
                low, high = (int(part) if part else None for part in match.groups())
        model.fields[name] = Field(
            name, "model" if models else kind, models, many, low, high, pattern, required, since
        )

    # Bodies
    def check(
        self, value: object, model: str, minors: dict[str, int], *, strict: bool = False
    ) -> tuple[dict[str, Any], list[Problem]]:
        """The body without what this minor does not know and without ``$`` fields but ``$objectType``, and what is wrong with it.

        ``strict``: unknown fields are wrong as well.
        """
        problems: list[Problem] = []
        checker = _Checker(self.models, minors, strict, problems)
        clean = checker.judge(value, (model,), "", 0)
        return clean if isinstance(clean, dict) else {}, problems[:_PROBLEMS]

    # Answers
    def stamp(self, value: dict[str, Any], model: str, minors: dict[str, int]) -> dict[str, Any]:
        """``value`` as an answer has it: ``$objectType`` and ``$reserved`` in every object, nothing that is None, nothing that
        the minor does not know. Raises AssertionError for a field that the model has not: that is the simulator's own mistake.
        """
        known = self.models[model]
        answer: dict[str, Any] = {
            "$objectType": model,
            "$reserved": {"$fv": revision(known.namespace, minors)},
        }
        for name, item in value.items():
            if name.startswith("$"):
                continue
            assert name in known.fields, f"{model} has no {name}"
            spec = known.fields[name]
            if item is None or spec.since > minors.get(known.namespace, 0):
                continue
            if spec.kind == "model" and not self.models[spec.models[0]].values:
                parts = item if spec.many else [item]
                stamped = [self._stamp_one(part, spec, minors) for part in parts]
                if not spec.many and stamped[0] is None:
                    continue
                answer[name] = stamped if spec.many else stamped[0]
            else:
                answer[name] = item
        return answer

    def _stamp_one(self, item: dict[str, Any], spec: Field, minors: dict[str, int]) -> Any:
        name = spec.models[0] if len(spec.models) == 1 else item["$objectType"]
        assert name in spec.models, f"{spec.name} is none of {spec.models}: {name}"
        model = self.models[name]
        if model.since > minors.get(model.namespace, 0):
            return None
        return self.stamp(item, name, minors)

    def field_at(self, model: str, path: list[str]) -> Field | None:
        """The field at the end of a path of names, None if there is none. Of one-of, any alternative's."""
        names: tuple[str, ...] = (model,)
        found: Field | None = None
        for part in path:
            found = next(
                (
                    self.models[name].fields[part]
                    for name in names
                    if name in self.models and part in self.models[name].fields
                ),
                None,
            )
            if found is None:
                return None
            names = found.models
        return found


def revision(namespace: str, minors: dict[str, int]) -> str:
    """The ``$fv`` of a namespace's objects."""
    return "v1.r0" if namespace == "common" else f"v4.r{minors.get(namespace, 0)}"


def _is_time(text: str) -> bool:
    """It is on the calendar, in UTC as well."""
    try:
        datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return False
    return True


class _Checker:
    """One body being judged."""

    def __init__(
        self,
        models: dict[str, Model],
        minors: dict[str, int],
        strict: bool,
        problems: list[Problem],
    ) -> None:
        self._models = models
        self._minors = minors
        self._strict = strict
        self._problems = problems

    def _wrong(self, path: str, message: str) -> None:
        self._problems.append(Problem(path or "/", message))

    def judge(self, value: object, names: tuple[str, ...], path: str, depth: int) -> Any:
        if not isinstance(value, dict) or depth > _DEPTH:
            self._wrong(path, "must be an object")
            return None
        name = self._name(value, names, path)
        if name is None:
            return None
        model = self._models[name]
        clean: dict[str, Any] = {"$objectType": name}
        for key, item in value.items():
            if not isinstance(key, str) or key.startswith("$") or item is None:
                continue
            spec = model.fields.get(key)
            if spec is None or spec.since > self._minors.get(model.namespace, 0):
                if self._strict:
                    self._wrong(f"{path}/{key}", "is not known")
                continue
            clean[key] = self._field(item, spec, f"{path}/{key}", depth + 1)
        for spec in model.fields.values():
            if spec.required and spec.name not in clean:
                self._wrong(f"{path}/{spec.name}", "is required")
        return clean

    def _name(self, value: dict[str, Any], names: tuple[str, ...], path: str) -> str | None:
        given = value.get("$objectType")
        usable = [
            name
            for name in names
            if self._models[name].since <= self._minors.get(self._models[name].namespace, 0)
        ]
        if given is None and len(names) == 1:
            return names[0]
        if given in usable:
            return str(given)
        self._wrong(path, f"$objectType must be one of {', '.join(usable)}, not {given!r}")
        return None

    def _field(self, item: object, spec: Field, path: str, depth: int) -> Any:
        if not spec.many:
            return self._one(item, spec, path, depth)
        if not isinstance(item, list):
            self._wrong(path, "must be a list")
            return []
        self._bounds(len(item), spec, path, "entries")
        return [
            self._one(part, spec, f"{path}/{index}", depth, inside=True)
            for index, part in enumerate(item)
        ]

    def _one(self, item: object, spec: Field, path: str, depth: int, inside: bool = False) -> Any:
        if spec.kind == "model":
            values = self._models[spec.models[0]].values
            if not values:
                return self.judge(item, spec.models, path, depth)
            if item not in values:
                self._wrong(path, f"must be one of {', '.join(values)}, not {str(item)[:80]!r}")
            return item
        if spec.kind == "any":
            return item
        if spec.kind in {"int", "bool", "map"}:
            self._plain(item, spec, path)
            return item
        if not isinstance(item, str):
            self._wrong(path, "must be a string")
            return item
        if spec.kind in _TEXT_KINDS:
            pattern, what = _TEXT_KINDS[spec.kind]
            if not pattern.fullmatch(item) or (spec.kind == "time" and not _is_time(item)):
                self._wrong(path, f"must be {what}")
        elif not inside:
            self._bounds(len(item), spec, path, "characters")
        if spec.pattern is not None and not spec.pattern.fullmatch(item):
            self._wrong(path, f"must match {spec.pattern.pattern}")
        return item

    def _plain(self, item: object, spec: Field, path: str) -> None:
        kinds = {"int": (int, "a whole number"), "bool": (bool, "true or false")}
        kind, what = kinds.get(spec.kind, (dict, "an object"))
        if not isinstance(item, kind) or (spec.kind == "int" and isinstance(item, bool)):
            self._wrong(path, f"must be {what}")
        elif isinstance(item, int) and spec.kind != "bool":
            if not -_INT_END <= item < _INT_END:
                self._wrong(path, "must be a number of 64 bits")
            self._bounds(item, spec, path, "")

    def _bounds(self, count: int, spec: Field, path: str, what: str) -> None:
        if spec.low is not None and count < spec.low:
            self._wrong(path, f"must be at least {spec.low} {what}".rstrip())
        if spec.high is not None and count > spec.high:
            self._wrong(path, f"must be at most {spec.high} {what}".rstrip())
