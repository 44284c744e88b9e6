# SPDX-License-Identifier: AGPL-3.0-or-later
"""The lines with which a plugin describes a job, checked. And whether that job may have files with holes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bacula_adapter.backend.attributes import parse_number
from bacula_adapter.backend.interface import JobInfo, JobKind, Level
from bacula_adapter.backend.packets import ProtocolError
from replicator.config import Config
from replicator.errors import UsageError
from replicator.private_files import read_file

_logger = logging.getLogger(__name__)

#: Lines of a job or of its parameters; more are no conversation.
LINES_MAX: Final = 1000
_NAME_MAX: Final = 255
_TEXT_MAX: Final = 4096
_JOB_ID_MAX: Final = (1 << 32) - 1
_SINCE_MAX: Final = 1 << 40
#: The file daemon's configuration where its command line names none.
FD_CONFIG: Final = Path("/etc/bacula/bacula-fd.conf")
_FD_CONFIG_MAX: Final = 4 << 20
_YES: Final = frozenset({"yes", "true", "on", "1"})


def parse_job(lines: Iterable[str], *, extended: bool) -> JobInfo:
    """A job from its lines; unknown ones are ignored. Raises ProtocolError for one that is missing or cannot be.

    ``addressed`` says what the plugin can; see ``decide_streams``.
    """
    values: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals:
            values[key] = value.strip()
    name = _text(values, "Name", _NAME_MAX)
    if not name:
        raise ProtocolError("the job has no Name=")
    where = None if "RegexWhere" in values else _text(values, "Where", _TEXT_MAX)
    return JobInfo(
        name=name,
        job_id=parse_number("JobID", values.get("JobID", "0"), _JOB_ID_MAX),
        kind=JobKind(_letter(values, "Type", "BRE", "")),
        level=Level(_letter(values, "Level", "FDI", "F")),
        since=parse_number("Since", values.get("Since", "0"), _SINCE_MAX),
        previous=_text(values, "PrevJobName", _NAME_MAX),
        where=where,
        regex_where=_text(values, "RegexWhere", _TEXT_MAX),
        replace=_letter(values, "Replace", "awno", "a"),
        accurate=_letter(values, "Accurate", "01", "0") == "1",
        client=_text(values, "Client", _NAME_MAX),
        fd_version=_text(values, "FDVersion", _NAME_MAX),
        fd_config=_text(values, "FDConfig", _TEXT_MAX),
        addressed=extended,
    )


def _text(values: dict[str, str], key: str, longest: int) -> str:
    value = values.get(key, "")
    if len(value) > longest or not value.isprintable():
        raise ProtocolError(f"{key}= is too long, or not printable")
    return value


def _letter(values: dict[str, str], key: str, letters: str, default: str) -> str:
    value = values.get(key, default)
    if len(value) != 1 or value not in letters:
        raise ProtocolError(f"{key}={value[:20]} is none of {', '.join(letters)}")
    return value


def decide_streams(job: JobInfo, config: Config) -> bool:
    """Whether files go without their holes: ``JobInfo.addressed``. Says why not, where an operator may wonder. Reads a file.

    Bacula does not encrypt files with holes: 9.6 stores them in plain text and says nothing, 15.0 fails the job. So where
    it is not certain that the file daemon does not encrypt, they go as plain streams.
    """
    if config.bacula_streams == "plain":
        return False
    if config.bacula_streams == "addressed":
        if not job.addressed:
            raise UsageError(
                "bacula_streams: addressed needs replicator-fd.so; this plugin takes plain streams only"
            )
        return True
    if not job.addressed:
        return False
    path = Path(job.fd_config) if job.fd_config else FD_CONFIG
    why = why_plain(path)
    if why:
        _logger.info("images go to Bacula as plain streams, zeros included: %s", why)
    return not why


def why_plain(path: Path) -> str:
    """Why a file daemon with this configuration must get plain streams; empty if it need not. Blocks, briefly."""
    unknown = "so it is not known whether it encrypts; bacula_streams = addressed if it does not"
    if not path.is_absolute():
        return f"the file daemon's configuration {path} cannot be found from here, {unknown}"
    try:
        text = read_file(path, _FD_CONFIG_MAX, private=False).decode("utf-8", "replace")
    except UsageError as error:
        return f"the file daemon's configuration cannot be read ({error}), {unknown}"
    encrypts, includes = _look_for_encryption(text)
    if encrypts:
        return f"the file daemon encrypts (PKI Encryption in {path})"
    if includes:
        return f"the file daemon's configuration {path} includes other files (@), {unknown}"
    return ""


#: A quoted text, a comment, or what ends a directive.
_PART: Final = re.compile(r'"(?:[^"\\]|\\.)*"|#[^\n]*|[;{}\n]|[^";{}\n#]+')


def _look_for_encryption(text: str) -> tuple[bool, bool]:
    """Whether a configuration turns encryption on, and whether parts of it are elsewhere. As Bacula reads: blanks and case in
    keywords do not count.
    """
    encrypts = includes = False
    directive = ""
    for match in _PART.finditer(text + "\n"):
        part = match[0]
        if part[0] == "#":
            continue
        if part not in ";{}\n":
            includes |= not directive.strip() and part.lstrip().startswith("@")
            directive += part
            continue
        key, _, value = directive.partition("=")
        if re.sub(r"\s", "", key).lower() == "pkiencryption":
            encrypts |= value.strip().strip('"').lower() in _YES
        directive = ""
    return encrypts, includes


__all__ = ["FD_CONFIG", "LINES_MAX", "decide_streams", "parse_job", "why_plain"]
