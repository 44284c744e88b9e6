# SPDX-License-Identifier: AGPL-3.0-or-later
"""Authorities, certificates and contexts for tests of TLS. Keys are made once: that takes most of the time."""

from __future__ import annotations

import ssl
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import trustme

from replicator.wire.tls import make_context

HOST = "127.0.0.1"


@cache
def authority(name: str = "ours") -> trustme.CA:
    """The same one for the same name."""
    return trustme.CA(organization_name=name)


def authorities(name: str = "ours") -> str:
    """What ``dr_ca_cert`` holds."""
    return authority(name).cert_pem.bytes().decode("ascii")


@cache
def issue(
    *names: str,
    ca: str = "ours",
    common_name: str | None = None,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> trustme.LeafCert:
    """A certificate and its key."""
    return authority(ca).issue_cert(
        *names, common_name=common_name, not_before=not_before, not_after=not_after
    )


def write(folder: Path, certificate: trustme.LeafCert, name: str) -> tuple[Path, Path]:
    """Certificate (with its chain) and key as files, the key private. Files that are there are replaced, each in one step."""
    shown, key = folder / f"{name}.pem", folder / f"{name}.key.pem"
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    for path, content in ((shown, chain), (key, certificate.private_key_pem.bytes())):
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(content)
        new.rename(path)
    return shown, key


def context(
    certificate: trustme.LeafCert, *, server_side: bool, trusted: str | None = None
) -> ssl.SSLContext:
    """One side's context; ``trusted``: authorities in PEM form."""
    with TemporaryDirectory() as folder:
        shown, key = write(Path(folder), certificate, "side")
        return make_context(shown, key, trusted or authorities(), server_side=server_side)
