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

from replicator import timetable
from replicator.addresses import is_iqn, parse_dsip, parse_elements, parse_prism_central
from replicator.errors import UsageError

DEFAULT_PATH = Path("/etc/replicator/replicator.conf")
_FILE_SIZE_MAX = 1 << 20

#: What dr_compression may be: zstd levels beside auto and off.
_COMPRESSION = r"auto|off|-[1-7]|[1-9]|1[0-9]"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]

_MTLS = ("dr_auth_cert", "dr_auth_key", "dr_ca_cert")

#: Keys that only the other side reads, by the side on which they do nothing. ``dr_allow`` is refused on a source.
NO_USE_ON_SOURCE = frozenset({"dr_listen", "dr_restore_points", "push_apply_remote"})
NO_USE_ON_RECEIVER = frozenset(
    {
        "chunk_size_mib", "concurrent_vms", "dr_compression", "dr_congestion", "dr_digest", "held_snapshot_hours",
        "held_snapshots_max", "image_disks", "max_bandwidth_mbps", "max_bandwidth_schedule", "on_reference_loss",
        "push_interval", "qemu_nbd_socket", "qemu_socket", "source", "verify_sample_mib",
    }
)  # fmt: skip
#: What chooses among the VMs of one source host: there is one VM where the source is not Nutanix.
NUTANIX_ONLY = frozenset({"exclude", "cluster", "concurrent_vms"})


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every option, with its default. Sizes in the unit that the name ends in; paths absolute."""

    # Prism
    prism_central: Name | None = None
    prism_port: Port = 9440
    prism_api_version: Literal["auto", "v3", "v4"] = "auto"
    user: str = ""
    password: str = ""
    passfile: Path | None = None
    prism_api_key: Path | None = None
    prism_ca_cert: Path | None = None
    prism_insecure: bool = False
    prism_element: str = ""
    prism_element_user: str = ""
    prism_element_passfile: Path | None = None
    prism_v3_expose: Literal["auto", "vg-clone", "vg-image", "vg-url"] = "auto"
    cluster: str = ""
    application_consistent: Literal["true", "try", "false"] = "try"
    data_path: Literal["auto", "iscsi", "rest"] = "auto"
    dsip: str = ""
    iscsi_initiator: str = ""
    iscsi_chap: Literal["mutual", "one-way", "none"] = "mutual"
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
    target_format: Literal["raw", "qcow2", "vmdk", "vhd", "vhdx"] = "raw"
    from_: Literal["replica"] | None = msgspec.field(default=None, name="from")
    point: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None
    bacula_streams: Literal["auto", "addressed", "plain"] = "auto"
    backend_timeout: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 120
    backup_reference_days: Annotated[int, msgspec.Meta(ge=1, le=365)] = 35
    # The DR channel
    dr_host: str = ""
    dr_port: Port = 9848
    dr_listen: str = ""
    dr_auth_token: str = ""
    dr_auth_cert: Path | None = None
    dr_auth_key: Path | None = None
    dr_ca_cert: Path | None = None
    dr_allow: str = ""
    dr_cipher: Literal["aes-256-gcm", "none"] = "aes-256-gcm"
    dr_timeout: Annotated[int, msgspec.Meta(ge=2, le=600)] = 8
    on_reference_loss: Literal["resync", "seed", "fail"] = "resync"
    verify_sample_mib: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 64
    dr_restore_points: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 7
    dr_compression: str = "auto"
    dr_congestion: Annotated[str, msgspec.Meta(min_length=1, max_length=15)] = "auto"
    dr_digest: Literal["xxh3-128", "blake3-256"] = "xxh3-128"
    max_bandwidth_mbps: Annotated[int, msgspec.Meta(ge=0, le=timetable.RATE_MBPS_MAX)] = 0
    max_bandwidth_schedule: str = ""
    push_interval: Annotated[int, msgspec.Meta(ge=1, le=31_536_000)] = 300
    push_apply_remote: bool = True
    rpo_target: Annotated[int, msgspec.Meta(ge=0, le=31_536_000)] = 0
    held_snapshots_max: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 3
    held_snapshot_hours: Annotated[int, msgspec.Meta(ge=1, le=8760)] = 48
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
    metrics_listen: str = ""
    job_cleanup_on_abort: bool = True

    def __repr__(self) -> str:
        return f"Config(source={self.source!r}, vm={self.vm!r}, state_dir={str(self.state_dir)!r})"

    @property
    def is_source(self) -> bool:
        """Whether this host pushes: it names a receiver."""
        return bool(self.dr_host)

    @property
    def control_path(self) -> Path:
        """The control socket of the process that has this state directory."""
        return self.control_socket or self.state_dir / "control.sock"

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port of ``metrics_listen``; None if there is none."""
        return parse_listen(self.metrics_listen)

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
    return load_noting(path)[0]


def load_noting(path: Path) -> tuple[Config, list[str]]:
    """As ``load``, and a line about each key in the file that does nothing on this side."""
    values = read_values(path)
    try:
        config = check(values)
    except UsageError as error:
        raise UsageError(f"configuration {path}: {error}") from None
    return config, _idle_keys(values, config)


def _idle_keys(values: dict[str, str], config: Config) -> list[str]:
    here, there, idle = "receiver", "source", NO_USE_ON_RECEIVER
    if config.is_source:
        here, there, idle = "source", "receiver", NO_USE_ON_SOURCE
    found = [
        f"{key} does nothing on a {here}: it belongs in the {there}'s configuration"
        for key in values
        if key in idle
    ]
    if config.is_source and config.source != "nutanix":
        found += [
            f"{key} does nothing with source = {config.source}, which has one VM"
            for key in values
            if key in NUTANIX_ONLY
        ]
    return found


def read_values(path: Path) -> dict[str, str]:
    """The values in a file, not checked yet. Raises UsageError where it cannot be read, or holds a secret and is open to others."""
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
    holds_secret = bool(values.get("password")) or is_key_text(values.get("dr_auth_token", ""))
    if holds_secret:
        check_private(path, mode)
    return values


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
    known = {field.encode_name for field in msgspec.structs.fields(Config)}
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
    if not re.fullmatch(_COMPRESSION, config.dr_compression):
        raise UsageError("dr_compression: expected auto, off or a zstd level from -7 to 19")
    parse_schedule(config.max_bandwidth_schedule)
    parse_listen(config.metrics_listen)
    for key in ("dr_host", "dr_listen"):
        try:
            getattr(config, key).encode("idna")
        except UnicodeError:
            raise UsageError(f"{key}: expected a host name or an address") from None
    _check_credentials(config)
    _check_prism(config, port_given="prism_port" in values)
    if config.point is not None and not config.from_ and not config.mode.startswith("failover-"):
        raise UsageError("point: says which recovery point to back up; give from = replica too")
    if config.from_ and config.is_source:
        raise UsageError(
            "from: replica is for the receiver's host, where the recovery points are; dr_host says that this is a source"
        )
    return config


def _check_prism(config: Config, *, port_given: bool) -> None:
    """What is said of Prism must not contradict itself. The files are looked at by ``prism_access``."""
    _, port = parse_prism_central(config.prism_central or "x")
    if port is not None and port_given and port != config.prism_port:
        raise UsageError(
            f"prism_port: {config.prism_port} contradicts prism_central, which says {port}; remove one"
        )
    if config.password and config.passfile is not None:
        raise UsageError("passfile: contradicts password; remove password")
    if config.prism_api_key is not None:
        for key in ("user", "password", "passfile"):
            if getattr(config, key):
                raise UsageError(
                    f"prism_api_key: contradicts {key}; an account has one or the other"
                )
        if config.prism_api_version == "v3":
            raise UsageError("prism_api_key: v3 takes no API keys; give user and passfile")
    elif (config.password or config.passfile is not None) and not config.user:
        key = "password" if config.password else "passfile"
        raise UsageError(f"user: missing; it says whose password {key} gives")
    if config.data_path == "rest" and config.prism_api_version == "v4":
        raise UsageError(
            "data_path: rest cannot be had with prism_api_version = v4, which makes no image of a snapshot's disk;"
            " set data_path = iscsi or prism_api_version = v3"
        )
    if config.prism_insecure and config.prism_ca_cert is not None:
        raise UsageError("prism_ca_cert: contradicts prism_insecure, which checks no certificate")
    if bool(config.prism_element_user) != (config.prism_element_passfile is not None):
        missing = "prism_element_passfile" if config.prism_element_user else "prism_element_user"
        raise UsageError(f"{missing}: missing; an account of the Elements takes both")
    parse_elements(config.prism_element)
    parse_dsip(config.dsip)
    name = config.iscsi_initiator
    if name and not is_iqn(name):
        raise UsageError(
            "iscsi_initiator: expected an IQN in lower case, such as iqn.2026-01.org.example:dr-service-01"
        )


def _check_credentials(config: Config) -> None:
    """What is proved on the DR channel must not contradict itself. The files are looked at by ``credentials``."""
    missing = [key for key in _MTLS if getattr(config, key) is None]
    if missing and len(missing) < len(_MTLS):
        raise UsageError(f"{missing[0]}: missing; mTLS takes {', '.join(_MTLS)}, all three")
    if config.dr_allow:
        from replicator.wire.peers import parse_allow  # noqa: PLC0415 - loads the transport, which few commands need

        parse_allow(config.dr_allow)
    if config.dr_allow and config.is_source:
        raise UsageError("dr_allow: belongs on the receiver; remove it here")
    if config.dr_allow and missing:
        raise UsageError(f"dr_allow: says what certificates may push; set {', '.join(_MTLS)} too")
    if config.is_source and not missing:
        if config.dr_auth_token:
            raise UsageError(
                "dr_auth_token: contradicts dr_auth_cert; a source proves a key or a certificate"
            )
        if config.dr_cipher == "none":
            raise UsageError("dr_cipher: none contradicts dr_auth_cert; TLS always encrypts")


def _allowed(key: str) -> str:
    """What a key may be set to, in words."""
    fields = msgspec.structs.fields(Config)
    kind = msgspec.inspect.type_info(
        next(field.type for field in fields if field.encode_name == key)
    )
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


def parse_schedule(text: str) -> timetable.Timetable | None:
    """``max_bandwidth_schedule``; None if there is none. Raises UsageError."""
    if not text:
        return None
    try:
        return timetable.parse(text)
    except UsageError as error:
        raise UsageError(f"max_bandwidth_schedule: {error}") from None


def parse_listen(text: str) -> tuple[str, int] | None:
    """``metrics_listen``: host and port, of an IPv6 address in brackets; None if there is none. Raises UsageError."""
    if not text:
        return None
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^][:\s/]+)):([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise UsageError("metrics_listen: expected HOST:PORT, such as 127.0.0.1:9849 or [::1]:9849")
    host = match[1] or match[2]
    try:
        host.encode("idna")
    except UnicodeError:
        raise UsageError("metrics_listen: expected a host name or an address") from None
    return host, int(match[3])


def check_private(path: Path, mode: int) -> None:
    """Raise UsageError if others than the owner may read or write a file that holds a secret."""
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(
            f"{path} holds a secret and is open to others (mode {stat.S_IMODE(mode):04o}):"
            f" chmod 600 {path}"
        )


def is_key_text(token: str) -> bool:
    """Whether ``dr_auth_token`` is keys themselves, not a path."""
    return bool(token) and not token.startswith("/")
