# SPDX-License-Identifier: AGPL-3.0-or-later
"""The one configuration model: ``key = value`` lines, checked as a whole before anything is touched.

Every key of the product is known here. A key that is unknown, badly valued, contradictory, or that this version cannot
honour is refused in one line that names it. Secrets are read here and kept in types that never print them.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import msgspec.inspect

from replicator.errors import UsageError
from replicator.wire.keys import Keyring, PreSharedKey

DEFAULT_PATH = Path("/etc/replicator/replicator.conf")
_FILE_SIZE_MAX = 1 << 20

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]

#: Keys that would change what an operator relies on, and that this version cannot honour yet.
_NOT_IN_THIS_VERSION = {
    "dr_auth_cert": "mTLS on the DR channel",
    "dr_auth_key": "mTLS on the DR channel",
    "dr_ca_cert": "mTLS on the DR channel",
    "max_bandwidth_mbps": "the throttle",
}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every option, with its default. Sizes in the unit that the name ends in; paths absolute."""

    # Prism
    prism_central: Name | None = None
    prism_port: Port = 9440
    prism_api_version: Literal["auto", "v3", "v4"] = "auto"
    user: str = ""
    password: str = ""
    passfile: Path | None = None
    prism_insecure: bool = False
    cluster: str = ""
    application_consistent: Literal["true", "try", "false"] = "try"
    data_path: Literal["auto", "iscsi", "rest"] = "auto"
    dsip: str = ""
    iscsi_initiator: str = ""
    prism_rate_rpm: Annotated[int, msgspec.Meta(ge=1, le=6000)] = 30
    # Selection and concurrency
    vm: str = "*"
    exclude: str = ""
    concurrent_vms: Count = 2
    concurrent_disks: Count = 4
    chunk_size_mib: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    # Bacula and restore
    mode: Literal[
        "backup", "restore", "estimate", "seed", "bitmap-push", "receiver", "failover-test",
        "failover-planned", "failover-unplanned", "failover-undo", "failover-perm",
    ] = "backup"  # fmt: skip
    where: str = ""
    restore_vm_name: str = ""
    target_cluster: str = ""
    target_container: str = ""
    network_map: str = ""
    power_on: bool = False
    restore_disks_only: str = ""
    vcpu: Count | None = None
    memory_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] | None = None
    cross_restore: bool = True
    # The DR channel
    dr_host: str = ""
    dr_port: Port = 9848
    dr_listen: str = ""
    dr_auth_token: str = ""
    dr_auth_cert: Path | None = None
    dr_auth_key: Path | None = None
    dr_ca_cert: Path | None = None
    dr_restore_points: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 7
    dr_digest: Literal["xxh3-128", "blake3-256"] = "xxh3-128"
    max_bandwidth_mbps: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    push_interval: Annotated[int, msgspec.Meta(ge=1, le=31_536_000)] = 300
    push_apply_remote: bool = True
    # Sources
    source: Literal["nutanix", "qemu", "image"] = "nutanix"
    image_disks: str = ""
    qemu_socket: Path | None = None
    qemu_nbd_socket: Path | None = None
    # This process
    verbose: Annotated[int, msgspec.Meta(ge=0, le=3)] = 1
    debug_log: Path = Path("/var/log/replicator/backend.log")
    working_dir: Path | None = None
    state_dir: Path = Path("/var/lib/replicator")
    control_socket: Path | None = None
    job_cleanup_on_abort: bool = True

    def __repr__(self) -> str:
        return f"Config(source={self.source!r}, vm={self.vm!r}, state_dir={str(self.state_dir)!r})"

    @property
    def is_source(self) -> bool:
        """Whether this host pushes: it names a receiver."""
        return bool(self.dr_host)

    @property
    def control_path(self) -> Path:
        """The receiver's control socket."""
        return self.control_socket or self.state_dir / "control.sock"

    @property
    def work_path(self) -> Path:
        """Scratch of this process."""
        return self.working_dir or self.state_dir / "work"

    @property
    def chunk(self) -> int:
        """Chunk size in bytes."""
        return self.chunk_size_mib << 20


_TRUE = {"yes", "true", "on", "1"}
_FALSE = {"no", "false", "off", "0"}
_BOOLS = {field.name for field in msgspec.structs.fields(Config) if field.type is bool}
_PATHS = {
    field.name
    for field in msgspec.structs.fields(Config)
    if field.type is Path or field.type == (Path | None)
}


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises UsageError with one line; touches nothing."""
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_SIZE_MAX + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UsageError(f"configuration {path}: {error.strerror}") from None
    if len(text) > _FILE_SIZE_MAX:
        raise UsageError(f"configuration {path}: larger than {_FILE_SIZE_MAX} bytes")
    try:
        values = parse_lines(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"configuration {path}: not UTF-8 text") from None
    except UsageError as error:
        raise UsageError(f"configuration {path}: {error}") from None
    holds_secret = bool(values.get("password")) or _is_hex(values.get("dr_auth_token", ""))
    if holds_secret:
        check_private(path, mode)
    try:
        return check(values)
    except UsageError as error:
        raise UsageError(f"configuration {path}: {error}") from None


def parse_lines(text: str) -> dict[str, str]:
    """``key = value`` lines to a dictionary; ``#`` begins a comment at the start of a line or after a blank."""
    values: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        if not line:
            continue
        key, equals, value = line.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not equals or not key:
            raise UsageError(f"line {number}: expected key = value")
        if key in values:
            raise UsageError(f"line {number}: {key} is given twice")
        values[key] = value.strip().strip('"')
    return values


def check(values: dict[str, str]) -> Config:
    """Check all values together. Raises UsageError that names the key, never its secret."""
    known = {field.name for field in msgspec.structs.fields(Config)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"unknown key {key}{hint}")
    converted: dict[str, Any] = {key: _convert(key, value) for key, value in values.items()}
    try:
        config = msgspec.convert(converted, Config, strict=False)
    except msgspec.ValidationError as error:
        _, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        raise UsageError(f"{key}: expected {_allowed(key)}") from None
    for key in ("dr_host", "dr_listen"):
        try:
            getattr(config, key).encode("idna")
        except UnicodeError:
            raise UsageError(f"{key}: expected a host name or an address") from None
    for key, what in _NOT_IN_THIS_VERSION.items():
        if getattr(config, key):
            raise UsageError(f"{key}: this version does not have {what} yet; remove the key")
    return config


def _allowed(key: str) -> str:
    """What a key may be set to, in words."""
    fields = msgspec.structs.fields(Config)
    kind = msgspec.inspect.type_info(next(field.type for field in fields if field.name == key))
    if isinstance(kind, msgspec.inspect.UnionType):  # or None: the default, which nobody writes
        kind = next(each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
    match kind:
        case msgspec.inspect.IntType():
            return f"a whole number from {kind.ge} to {kind.le}"
        case msgspec.inspect.LiteralType():
            return "one of " + ", ".join(map(str, kind.values))
        case msgspec.inspect.StrType(min_length=int(), max_length=int()):
            return f"{kind.min_length} to {kind.max_length} characters"
    return "another value"


def _convert(key: str, value: str) -> Any:
    if key in _BOOLS:
        if value.lower() in _TRUE:
            return True
        if value.lower() in _FALSE:
            return False
        raise UsageError(f"{key}: expected yes or no")
    if key in _PATHS:
        path = Path(value)
        if not path.is_absolute():
            raise UsageError(f"{key}: expected an absolute path")
        return path
    return value


def parse_image_disks(text: str) -> dict[str, Path]:
    """``disk-0=/path/a.raw,disk-1=/path/b.raw`` to paths by disk. Raises UsageError."""
    disks: dict[str, Path] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, path = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"disk-[0-9]{1,4}", name):
            raise UsageError(f"image_disks: expected disk-<N>=/path, got {part!r}")
        if not Path(path).is_absolute():
            raise UsageError(f"image_disks: {name}: expected an absolute path")
        if name in disks or Path(path) in disks.values():
            raise UsageError(f"image_disks: {part!r} names a disk or a file twice")
        disks[name] = Path(path)
    if not disks:
        raise UsageError("image_disks: name at least one disk (disk-0=/path/to/image.raw)")
    return disks


def check_private(path: Path, mode: int) -> None:
    """Raise UsageError if others than the owner may read or write a file that holds a secret."""
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(
            f"{path} holds a secret and is open to others (mode {stat.S_IMODE(mode):04o}):"
            f" chmod 600 {path}"
        )


def _is_hex(token: str) -> bool:
    return bool(token) and not token.startswith("/")


def _read_key(path: Path, vm: str | None) -> PreSharedKey:
    try:
        with path.open("rb") as file:
            check_private(path, os.fstat(file.fileno()).st_mode)
            text = file.read(4096)
    except OSError as error:
        raise UsageError(f"dr_auth_token: {path}: {error.strerror}") from None
    try:
        return PreSharedKey.from_hex(text.decode("ascii", "replace").strip(), name=path.name, vm=vm)
    except UsageError as error:
        raise UsageError(f"dr_auth_token: {path}: {error}") from None


def load_keys(config: Config) -> Keyring:
    """The keys that ``dr_auth_token`` names: the key itself, a file with it, or (receiver) a folder of ``VM.key`` files.

    A key from a folder may push only the VM (UUID or name) that its file is named after. Raises UsageError.
    """
    token = config.dr_auth_token
    if not token:
        raise UsageError("dr_auth_token: missing; make one with: openssl rand -hex 32")
    if _is_hex(token):
        try:
            return Keyring([PreSharedKey.from_hex(token)])
        except UsageError as error:
            raise UsageError(f"dr_auth_token: {error}") from None
    path = Path(token)
    if not path.is_dir():
        return Keyring([_read_key(path, None)])
    files = sorted(path.glob("*.key"))
    if not files:
        raise UsageError(f"dr_auth_token: no *.key file in {path}")
    return Keyring([_read_key(file, file.stem) for file in files])


def load_key(config: Config) -> PreSharedKey:
    """The one key that a source pushes with. Raises UsageError."""
    keys = list(load_keys(config).values())
    if len(keys) != 1:
        raise UsageError("dr_auth_token: a source pushes with one key; name its file")
    return keys[0]
