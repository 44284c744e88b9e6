# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a source proves itself to its receiver: by a pre-shared key or by a certificate."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from replicator.config import Config
from replicator.credentials.certificates import Certificates, load_certificates
from replicator.credentials.keys import load_source_keys
from replicator.credentials.watch import Credentials, Loaded
from replicator.wire.handshake import SUITE_READABLE, SUITE_SEALED
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.stream import IDLE_TIMEOUT_S, connect_stream
from replicator.wire.tls import secure_stream

_logger = logging.getLogger(__name__)

_SUITES: Final = {"aes-256-gcm": (SUITE_SEALED,), "none": (SUITE_READABLE,)}


class Proof(Protocol):
    """One way for a source to prove itself."""

    @property
    def name(self) -> str:
        """For logs."""

    async def prove(
        self,
        transport: trio.abc.Stream,
        *,
        deadline_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> trio.abc.Stream:
        """The stream over ``transport``, which is closed on any error.

        Raises AuthenticationError where one side does not take the other, WireError, PeerSilentError,
        ``trio.BrokenResourceError``.
        """


@dataclass(frozen=True, slots=True)
class KeyProof:
    """A source proves that it holds a pre-shared key."""

    key: PreSharedKey
    suites: tuple[int, ...]

    @property
    def name(self) -> str:
        """``the key NAME``."""
        return f"the key {self.key.name}"

    async def prove(
        self,
        transport: trio.abc.Stream,
        *,
        deadline_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> trio.abc.Stream:
        """See ``connect_stream``."""
        return await connect_stream(
            transport,
            self.key,
            deadline_s=deadline_s,
            idle_timeout_s=idle_timeout_s,
            suites=self.suites,
        )


@dataclass(frozen=True, slots=True)
class CertificateProof:
    """A source shows a certificate, to a receiver whose certificate holds ``host``."""

    certificates: Certificates
    host: str

    @property
    def name(self) -> str:
        """``the certificate FILE``."""
        return f"the certificate {self.certificates.own.path}"

    async def prove(
        self,
        transport: trio.abc.Stream,
        *,
        deadline_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> trio.abc.Stream:
        """See ``secure_stream``."""
        return await secure_stream(
            transport,
            self.certificates.context,
            server_name=self.host,
            deadline_s=deadline_s,
            idle_timeout_s=idle_timeout_s,
        )


class SourceCredentials(Credentials):
    """What a source proves. Made from the configuration; raises UsageError."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._taken = b""  # the hint of the key that the receiver took last

    def _load(self) -> Loaded:
        certificates = load_certificates(self._config)
        keys = load_source_keys(self._config) if certificates is None else Keyring([])
        return Loaded(keys, certificates)

    async def proofs(self) -> Sequence[Proof]:
        """The ways to prove itself, at least one, the one to try first first; out of files read again if they changed.

        Raises AuthenticationError where the certificate does not hold now: nobody would take it.
        """
        await self.refresh()
        loaded = self.loaded
        if loaded.certificates is not None:
            loaded.certificates.check_own(time.time())
            return [CertificateProof(loaded.certificates, self._config.dr_host)]
        keys = sorted(loaded.keys.values(), key=lambda key: key.hint != self._taken)
        return [KeyProof(key, _SUITES[self._config.dr_cipher]) for key in keys]

    def taken(self, proof: Proof) -> None:
        """Note that the receiver took this proof: it is tried first from now on."""
        if not isinstance(proof, KeyProof) or proof.key.hint == self._taken:
            return
        if proof.key.hint != next(iter(self.loaded.keys), None):
            _logger.warning(
                "the receiver takes %s, not the key before it in dr_auth_token; it is tried first from now on",
                proof.name,
            )
        elif self._taken:
            _logger.info("the receiver takes %s", proof.name)
        self._taken = proof.key.hint
