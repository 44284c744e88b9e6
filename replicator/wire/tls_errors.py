# SPDX-License-Identifier: AGPL-3.0-or-later
"""What OpenSSL's errors are called here: which side, which file or key, what to do. Pure."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import trio

from replicator.errors import AuthenticationError, WireError

_FAILED: Final = "TLS verification failed: "


def is_eof(error: ssl.SSLError) -> bool:
    """Whether the bytes ended without TLS's close."""
    # Python 3.11.2 has no class of its own for it.
    return (
        isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        or error.reason == "UNEXPECTED_EOF_WHILE_READING"
    )


def reason(error: ssl.SSLError) -> str:
    """OpenSSL's word for what went wrong, for people."""
    return (error.reason or "protocol error").replace("_", " ").lower()


#: OpenSSL's codes for a certificate without the host's name, or its address.
_MISMATCH: Final = (62, 64)
#: More names than this are not listed.
_NAMES_MAX: Final = 8

#: OpenSSL's codes (x509_vfy.h) for why a certificate was not taken. ``{peer}``: who showed it.
_VERIFY: Final[Mapping[int, str]] = MappingProxyType(
    dict.fromkeys(
        (2, 18, 19, 20, 21),
        "{peer}'s certificate was issued by an authority that dr_ca_cert on this side does not hold",
    )
    | {
        9: "{peer}'s certificate, or the authority that issued it, is not valid yet: compare the clocks of both hosts",
        10: "{peer}'s certificate, or the authority that issued it, has expired: renew it",
        26: "{peer}'s certificate may not be used for this: its extended key usage must hold serverAuth on a receiver,"
        " clientAuth on a source, or be left out",
    }
    | dict.fromkeys(_MISMATCH, "{peer}'s certificate does not name dr_host: {detail}")
)

#: What the other side's alert says of this side's certificate.
_ALERTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CERTIFICATE_EXPIRED": "it, or the authority that issued it, has expired",
        "UNKNOWN_CA": "dr_ca_cert on that side does not hold the authority that issued it",
        "BAD_CERTIFICATE": "it is not valid yet, or does not name this host as dr_host does there",
        "UNSUPPORTED_CERTIFICATE": "its extended key usage does not allow this use",
        "CERTIFICATE_REQUIRED": "none was shown",
        "CERTIFICATE_UNKNOWN": "it could not be used",
        "CERTIFICATE_REVOKED": "it was revoked",
    }
)
_NOT_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE",
     "BAD_RECORD_TYPE", "UNEXPECTED_MESSAGE", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}
)  # fmt: skip
_OLD_TLS: Final = frozenset({"UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"})


def explain(error: ssl.SSLError, peer: str, names: Sequence[str] = ()) -> Exception:
    """The error of our tree for one of the handshake; ``peer`` is who stands on the other side.

    ``names``: those that its certificate holds, for where none of them is the one that was asked for.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        text = _VERIFY.get(error.verify_code, "{peer}'s certificate: {detail}")
        said = text.format(peer=peer, detail=error.verify_message.rstrip("."))
        if error.verify_code in _MISMATCH:
            said += f"; it names {', '.join(names[:_NAMES_MAX]) or 'nothing'}"
            said += ", …" if len(names) > _NAMES_MAX else ""
        return AuthenticationError(_FAILED + said)
    if is_eof(error):
        return trio.BrokenResourceError(f"{peer} closed the connection in the handshake")
    word = error.reason or ""
    _, is_alert, alert = word.partition("ALERT_")
    if is_alert and alert in _ALERTS:
        return AuthenticationError(
            f"{_FAILED}{peer} refused the certificate of this side (dr_auth_cert): {_ALERTS[alert]}"
        )
    if alert == "PROTOCOL_VERSION" or word in _OLD_TLS:
        return WireError(f"{peer} does not speak TLS 1.3")
    if word == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return AuthenticationError(f"{_FAILED}{peer} showed no certificate (dr_auth_cert)")
    if word in _NOT_TLS:
        return WireError(
            f"{peer} does not speak TLS: it takes a pre-shared key (dr_auth_token), or is something else"
        )
    return WireError(f"TLS handshake with {peer} failed: {reason(error)}")


__all__ = ["explain", "is_eof", "reason"]
