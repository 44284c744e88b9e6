# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the configuration to how Prism and its data services are reached: the one place that reads their secrets.

Every job comes by here once, so that what weakens it is warned of each time.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
from pathlib import Path

from replicator import durable
from replicator.addresses import IQN_BYTES_MAX, is_iqn, parse_elements, parse_prism_central
from replicator.config import Config
from replicator.errors import StateError, UsageError
from replicator.prism.settings import Account, PrismSettings
from replicator.private_files import read_file

_logger = logging.getLogger(__name__)

_SECRET_FILE_MAX = 4096
#: Where Linux's own initiator keeps its name.
HOST_INITIATOR = Path("/etc/iscsi/initiatorname.iscsi")
#: In the state directory: the name that was made for this host.
INITIATOR_FILE = "initiator"
#: ``.internal`` is reserved for private use: nobody else's names begin like this.
_INITIATOR_PREFIX = "iqn.2026-01.internal.replicator:"


def prism_settings(config: Config) -> PrismSettings:
    """How to reach the Prism that ``config`` names. Reads the files of its secrets; blocks, briefly.

    Logs a warning for a password in the configuration and for an unchecked certificate. Raises UsageError that names the
    key: nothing to reach, no account, a file that cannot be read, is open to others or holds something else.
    """
    if config.prism_central is None:
        raise UsageError("prism_central: missing; it names Prism Central (source=nutanix)")
    host, port = parse_prism_central(config.prism_central)
    account = _account(config)
    element_account = None
    if config.prism_element_passfile is not None:
        password = read_passfile(config.prism_element_passfile, "prism_element_passfile")
        element_account = Account(config.prism_element_user, password)
    if config.prism_ca_cert is not None and not config.prism_ca_cert.is_file():
        raise UsageError(f"prism_ca_cert: {config.prism_ca_cert} is not a file")
    if config.password:
        _logger.warning(
            "password stands in the configuration: put it into a file of its own, mode 0600, and name that with passfile"
        )
    if config.prism_insecure:
        _logger.warning(
            "prism_insecure: Prism's certificate is not checked, whoever is on the way can read the password;"
            " for labs only, else give its authority with prism_ca_cert"
        )
    return PrismSettings(
        host=host,
        port=config.prism_port if port is None else port,
        api_version=config.prism_api_version,
        account=account,
        insecure=config.prism_insecure,
        ca=config.prism_ca_cert,
        rate_rpm=config.prism_rate_rpm,
        cluster=config.cluster,
        elements=parse_elements(config.prism_element),
        element_account=element_account,
        expose=config.prism_v3_expose,
    )


def _account(config: Config) -> Account:
    if config.prism_api_key is not None:
        return Account(api_key=_read_api_key(config.prism_api_key))
    if not config.user:
        raise UsageError("user: missing; it names the service account (or give prism_api_key)")
    if config.passfile is not None:
        return Account(config.user, read_passfile(config.passfile, "passfile"))
    if not config.password:
        raise UsageError("passfile: missing; a file with password = …, mode 0600")
    return Account(config.user, config.password)


def read_passfile(path: Path, key: str) -> str:
    """The password in a file with one line ``password = …``; ``#`` begins a comment at the start of a line only, and quotes
    around the whole are taken off. Raises UsageError that names ``key``, never what the file holds.
    """
    found = None
    for line in _secret_text(path, key).splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or name != "password":
            raise UsageError(f"{key}: {path}: expected one line: password = …")
        if found is not None:
            raise UsageError(f"{key}: {path}: password is given twice")
        found = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    if not found:
        raise UsageError(f"{key}: {path}: it holds no password; expected one line: password = …")
    return found


def _read_api_key(path: Path) -> str:
    text = _secret_text(path, "prism_api_key").strip()
    # It travels in a header.
    if not text or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise UsageError(f"prism_api_key: {path}: expected the key alone, in one line")
    return text


def _secret_text(path: Path, key: str) -> str:
    try:
        return read_file(path, _SECRET_FILE_MAX, private=True).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{key}: {path}: not UTF-8 text") from None
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def initiator_name(config: Config, host_file: Path = HOST_INITIATOR) -> str:
    """The name by which this host logs in to iSCSI targets: the configured one, else the host's own, else one that is made from
    the host's name and kept in the state directory, which must be there.

    Blocks, briefly. Raises StateError where what is kept is damaged, or cannot be written.
    """
    if config.iscsi_initiator:
        return config.iscsi_initiator
    name = _host_initiator(host_file)
    if name is not None:
        return name
    path = config.state_dir / INITIATOR_FILE
    try:
        if path.exists():
            with path.open("rb") as file:
                kept = file.read(IQN_BYTES_MAX + 2).decode("ascii", "replace").strip()
            if not is_iqn(kept):
                raise StateError(
                    f"{path} holds no initiator name: remove it, or set iscsi_initiator"
                )
            return kept
        made = _made_name()
        durable.write_file(path, made.encode() + b"\n")
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    return made


def _host_initiator(path: Path) -> str | None:
    """The name that the system's initiator has; None where there is none, or it is not for us to read."""
    try:
        with path.open("rb") as file:
            text = file.read(_SECRET_FILE_MAX).decode("ascii", "replace")
    except OSError:
        return None
    match = re.search(r"^InitiatorName=(\S+)\s*$", text, re.MULTILINE)
    return match[1] if match is not None and is_iqn(match[1]) else None


def _made_name() -> str:
    host = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")[:64] or "host"
    # Hosts that were cloned have one name; their sessions must not be taken for each other's.
    return f"{_INITIATOR_PREFIX}{host}-{secrets.token_hex(4)}"


__all__ = ["HOST_INITIATOR", "initiator_name", "prism_settings", "read_passfile"]
