# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a plugin string to a configuration, by the one model: what the string says goes before what the file says.

A string stands in clear in Bacula's catalogue, on its volumes and in its logs: paths of secrets are refused in it, a secret
itself is to be warned of by every job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from replicator.config import DEFAULT_PATH, Config, check, is_key_text, read_values
from replicator.errors import UsageError

#: Files of secrets: who may write plugin strings shall not choose which of this host's files are read as such.
SECRET_PATHS: Final = frozenset(
    {"passfile", "prism_api_key", "prism_element_passfile", "dr_auth_key"}
)
_INLINE: Final = ("password", "dr_auth_token")
#: Bacula's own words in a plugin string, and ours that says where the configuration is.
_RESERVED: Final = frozenset({"Accurate", "abort_on_error", "listing", "query", "config"})
_CONFIG_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,100}")
_STRING: Final = "PluginString="
_QUERY: Final = "query="


@dataclass(frozen=True, slots=True)
class Params:
    """A job's parameters. ``listing`` and ``query``: what is asked for, None if not. ``exposed``: keys of secrets that stand in the
    plugin string.
    """

    config: Config
    exposed: Sequence[str] = ()
    listing: str | None = None
    query: str | None = None


def load_params(lines: Iterable[str], *, extended: bool) -> Params:
    """Parameters from the lines of the dialogue. Raises UsageError in one line that names the key; touches nothing.

    Reads the configuration file.
    """
    given = _from_lines(lines, extended=extended)
    reserved = {key: given.pop(key) for key in list(given) if key in _RESERVED}
    for key in given:
        if key in SECRET_PATHS or (
            key == "dr_auth_token" and not is_key_text(given["dr_auth_token"])
        ):
            raise UsageError(
                f"{key}: the path of a secret is not taken from a plugin string; set it in the configuration file"
            )
    values = _from_file(reserved.get("config", ""))
    if "password" in given:
        for key in ("passfile", "prism_api_key"):
            values.pop(key, None)
    values |= given
    config = check(values)
    exposed = [key for key in _INLINE if given.get(key)]
    return Params(config, exposed, reserved.get("listing"), reserved.get("query"))


def with_options(config: Config, given: Mapping[str, str]) -> Config:
    """The configuration with what an operator has set at a restore on top. Raises UsageError that names the key."""
    for key in given:
        if key in SECRET_PATHS or key in _INLINE:
            raise UsageError(f"{key}: no option of a restore")
    return check({**values_of(config), **{_key(key): value for key, value in given.items()}})


def values_of(config: Config) -> dict[str, str]:
    """The configuration as keys and values of a file: those that are not the defaults. Secrets included."""
    values = {}
    for field in msgspec.structs.fields(Config):
        value = getattr(config, field.name)
        if value != field.default:
            text = ("yes" if value else "no") if isinstance(value, bool) else str(value)
            values[field.encode_name] = text
    return values


def _from_file(name: str) -> dict[str, str]:
    if name:
        if name.startswith("/"):
            return read_values(Path(name))
        if not _CONFIG_NAME.fullmatch(name):
            raise UsageError(
                "config: expected the NAME of /etc/replicator/NAME.conf, or an absolute path"
            )
        return read_values(DEFAULT_PATH.parent / f"{name}.conf")
    named = os.environ.get("REPLCTL_CONFIG")
    if named:
        return read_values(Path(named))
    return read_values(DEFAULT_PATH) if DEFAULT_PATH.exists() else {}


def _from_lines(lines: Iterable[str], *, extended: bool) -> dict[str, str]:
    if not extended:
        # The library puts what an operator has set at a restore behind what the string says: the last one counts.
        return dict(_pair(line) for line in lines)
    given: dict[str, str] = {}
    for line in lines:
        if line.startswith(_QUERY):
            given["query"] = line[len(_QUERY) :]
        if not line.startswith(_STRING):
            continue
        for word in split_string(line[len(_STRING) :]):
            key, value = _pair(word)
            if key in given:
                raise UsageError(f"{key}: given twice in the plugin string")
            given[key] = value
    return given


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    return _key(key), value.strip() if equals else "1"


def _key(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def split_string(text: str) -> list[str]:
    r"""The words of a plugin string: between blanks; what holds blanks stands in double quotes, ``\`` before a quote.

    What ``listing=`` asks for goes to the end of the string: Bacula puts it there as it is. Raises UsageError for a quote that
    does not end.
    """
    words: list[str] = []
    word: list[str] | None = None
    quoted = False
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\" and text[at + 1 : at + 2] == '"':
            at += 1
            word = [] if word is None else word
            word.append('"')
        elif char == '"':
            quoted = not quoted
            word = [] if word is None else word
        elif char.isspace() and not quoted:
            if word is not None:
                words.append("".join(word))
            word = None
        elif word is None and text.startswith("listing=", at):
            return [*words, text[at:].strip()]
        else:
            word = [] if word is None else word
            word.append(char)
        at += 1
    if quoted:
        raise UsageError("the plugin string has a double quote that does not end")
    return words if word is None else [*words, "".join(word)]


__all__ = ["SECRET_PATHS", "Params", "load_params", "split_string", "values_of", "with_options"]
