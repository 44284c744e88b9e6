# SPDX-License-Identifier: AGPL-3.0-or-later
"""The certificates that ``dr_auth_cert``, ``dr_auth_key`` and ``dr_ca_cert`` name: read, checked, and until when they hold."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from replicator.config import Config
from replicator.errors import AuthenticationError, UsageError
from replicator.private_files import read_file
from replicator.wire.tls import make_context

if TYPE_CHECKING:
    from cryptography import x509

WARN_S: Final = 30 * 86400
"""A certificate that ends within so many seconds is warned of."""
_SHOWN_MAX: Final = 4
_FILE_BYTES_MAX: Final = 1 << 20
_DAY_S: Final = 86400


@dataclass(frozen=True, slots=True)
class Validity:
    """A file of certificates; the tightest bounds of all that it holds, Unix seconds. ``what``: certificate or authority.

    ``fingerprint``: how SHA-256 of each begins, for people.
    """

    what: str
    path: Path
    not_before: float
    not_after: float
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.what} {self.path} (SHA-256 {self.fingerprint}) until {_date(self.not_after)}"

    def fault(self, now: float) -> str | None:
        """Why it does not hold at ``now``, for people; None if it does."""
        if now > self.not_after:
            return (
                f"{self.what} {self.path} expired {_days(now - self.not_after)} ago"
                f" ({_date(self.not_after)}): renew it"
            )
        if now < self.not_before:
            return (
                f"{self.what} {self.path} is not valid before {_date(self.not_before)}:"
                " set this host's clock, or renew it"
            )
        return None

    def warning(self, now: float) -> str | None:
        """What to say of it at ``now``; None while it holds for another 30 days."""
        fault = self.fault(now)
        if fault is not None:
            return fault
        rest_s = self.not_after - now
        if rest_s > WARN_S:
            return None
        return f"{self.what} {self.path} expires in {_days(rest_s)} ({_date(self.not_after)})"


@dataclass(frozen=True, slots=True)
class Certificates:
    """What TLS needs on one side, loaded."""

    context: ssl.SSLContext
    own: Validity
    authority: Validity

    def check_own(self, now: float) -> None:
        """Raise AuthenticationError if the other side cannot take this side's certificate at ``now``."""
        fault = self.own.fault(now)
        if fault is not None:
            raise AuthenticationError(f"dr_auth_cert: {fault}")


def certificate_paths(config: Config) -> list[Path]:
    """The files that ``load_certificates`` reads."""
    files = (config.dr_auth_cert, config.dr_auth_key, config.dr_ca_cert)
    return [path for path in files if path is not None]


def load_certificates(config: Config) -> Certificates | None:
    """Read and check the three files; None without them. Raises UsageError that names key, file and what to do. Blocks.

    A certificate that has expired loads: to say so is the business of who looks at the time.
    """
    if config.dr_auth_cert is None or config.dr_auth_key is None or config.dr_ca_cert is None:
        return None
    own = _certificates("dr_auth_cert", config.dr_auth_cert)
    authorities = _certificates("dr_ca_cert", config.dr_ca_cert)
    _check_key(config.dr_auth_key, own[0], config.dr_auth_cert)
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415 - as below

    pem = b"".join(each.public_bytes(Encoding.PEM) for each in authorities).decode("ascii")
    try:
        context = make_context(
            config.dr_auth_cert, config.dr_auth_key, pem, server_side=not config.is_source
        )
    except (ssl.SSLError, OSError) as error:
        # The files were good a moment ago: one of them is being replaced, or OpenSSL does not take the kind of key.
        raise UsageError(
            f"dr_auth_cert: {config.dr_auth_cert} cannot be used: {error.strerror or error}"
        ) from None
    return Certificates(
        context,
        _validity("certificate", config.dr_auth_cert, own),
        _validity("authority", config.dr_ca_cert, authorities),
    )


def check_own(config: Config) -> None:
    """Raise UsageError unless the certificate that ``dr_auth_cert`` names, which must be set, holds now. Blocks."""
    assert config.dr_auth_cert is not None
    own = _certificates("dr_auth_cert", config.dr_auth_cert)
    fault = _validity("certificate", config.dr_auth_cert, own).fault(time.time())
    if fault is not None:
        raise UsageError(f"dr_auth_cert: {fault}")


def load_validities(config: Config) -> list[Validity]:
    """How long the certificates hold, without a look at the key. Raises UsageError. Blocks."""
    found = []
    for key, what, path in (
        ("dr_auth_cert", "certificate", config.dr_auth_cert),
        ("dr_ca_cert", "authority", config.dr_ca_cert),
    ):
        if path is not None:
            found.append(_validity(what, path, _certificates(key, path)))
    return found


def _certificates(key: str, path: Path) -> list[x509.Certificate]:
    from cryptography import x509  # noqa: PLC0415 - more than a megabyte that only certificates need

    data = _read(key, path, private=False)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UsageError(f"{key}: {path} holds no certificate in PEM form") from None


def _check_key(path: Path, certificate: x509.Certificate, certificate_path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - as for certificates
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - as for certificates
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    data = _read("dr_auth_key", path, private=True)
    try:
        key = load_pem_private_key(data, None)
    except TypeError:
        raise UsageError(
            f"dr_auth_key: {path} is protected by a passphrase; write it without one"
            " (openssl pkey -in FILE -out NEW), mode 0600"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"dr_auth_key: {path} holds no private key in PEM form") from None
    ours, theirs = (
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for public in (key.public_key(), certificate.public_key())
    )
    if ours != theirs:
        raise UsageError(
            f"dr_auth_key: {path} is not the key of the certificate {certificate_path}"
        )


def _read(key: str, path: Path, *, private: bool) -> bytes:
    try:
        return read_file(path, _FILE_BYTES_MAX, private=private)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def _validity(what: str, path: Path, certificates: Iterable[x509.Certificate]) -> Validity:
    held = list(certificates)
    return Validity(
        what,
        path,
        max(each.not_valid_before_utc.timestamp() for each in held),
        min(each.not_valid_after_utc.timestamp() for each in held),
        _fingerprint(held),
    )


def _fingerprint(certificates: list[x509.Certificate]) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415 - as above

    shown = [
        hashlib.sha256(each.public_bytes(Encoding.DER)).hexdigest()[:8]
        for each in certificates[:_SHOWN_MAX]
    ]
    more = len(certificates) - len(shown)
    return " ".join(shown) + (f" and {more} more" if more else "")


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _days(span_s: float) -> str:
    days = int(span_s // _DAY_S)
    if days < 1:
        return "less than a day"
    return "1 day" if days == 1 else f"{days} days"


__all__ = [
    "WARN_S",
    "Certificates",
    "Validity",
    "certificate_paths",
    "check_own",
    "load_certificates",
    "load_validities",
]
