# SPDX-License-Identifier: AGPL-3.0-or-later
"""The simulator's own authority, made once for a directory, and a certificate for each address, made at every start."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replicator import durable

CA_FILE = "ca.pem"
_CA_KEY_FILE = "ca-key.pem"
_CA_DAYS, _LEAF_DAYS = 3650, 397


class Authority:
    """Signs the certificates of one simulator. ``path`` is what clients are given to trust."""

    def __init__(self, directory: Path) -> None:
        """Read the authority in ``directory``, or make one. Raises ValueError for a damaged one, OSError. Blocks."""
        self.path = directory / CA_FILE
        self._folder = directory / "tls"
        key_path = directory / _CA_KEY_FILE
        durable.make_dir(self._folder)
        if self.path.is_file() and key_path.is_file():
            self._certificate = x509.load_pem_x509_certificate(self.path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key_path} is not a key of this simulator")
            self._key = key
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Simulated Prism authority")
        self._certificate = (
            _builder(name, name, self._key.public_key(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(_key_id(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        durable.write_file(key_path, _private(self._key))
        durable.write_file(self.path, self._certificate.public_bytes(serialization.Encoding.PEM))

    def context(self, address: str, names: Sequence[str] = ()) -> ssl.SSLContext:
        """What a listener on ``address`` needs: a new certificate for it and for ``names``. Raises OSError. Blocks."""
        key = ec.generate_private_key(ec.SECP256R1())
        subjects: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address))]
        subjects += [x509.DNSName(name) for name in names]
        certificate = (
            _builder(_name(address), self._certificate.subject, key.public_key(), _LEAF_DAYS)
            .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_key_id(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / f"{address}.pem"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_private(key) + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(path)
        context.set_alpn_protocols(["http/1.1"])
        return context


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_id(key: ec.EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


__all__ = ["CA_FILE", "Authority"]
