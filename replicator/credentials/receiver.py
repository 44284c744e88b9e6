# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whom a receiver lets in: holders of its pre-shared keys and of certificates of its authority, on one port."""

from __future__ import annotations

import socket
import time
from typing import ClassVar, Final

import trio

from replicator.config import Config
from replicator.credentials.certificates import Certificates, load_certificates
from replicator.credentials.keys import load_keyring
from replicator.credentials.watch import Credentials, Loaded
from replicator.errors import AuthenticationError, WireError
from replicator.wire.handshake import (
    MESSAGE_BYTES_MAX,
    SUITE_READABLE,
    SUITE_SEALED,
    Alert,
    alert_message,
)
from replicator.wire.keys import Keyring
from replicator.wire.peers import CertificatePeer, KeyPeer, Peer, parse_allow
from replicator.wire.stream import IDLE_TIMEOUT_S, PeerSilentError, accept_stream
from replicator.wire.tls import FIRST_BYTE, secure_stream

_SUITES: Final = {"aes-256-gcm": (SUITE_SEALED,), "none": (SUITE_SEALED, SUITE_READABLE)}


class ReceiverCredentials(Credentials):
    """What a receiver accepts. Made from the configuration; raises UsageError.

    With a certificate that does not hold it goes on: a renewed one is taken when it is there, and keys are taken all the time.
    """

    _CONSEQUENCE: ClassVar[str] = "; until then no source can connect with a certificate"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._allowed = parse_allow(config.dr_allow)

    def _load(self) -> Loaded:
        certificates = load_certificates(self._config)
        # Without certificates a key must be there, and that it is missing is said.
        wanted = certificates is None or self._config.dr_auth_token
        keys = load_keyring(self._config) if wanted else Keyring([])
        return Loaded(keys, certificates)

    async def accept(
        self,
        transport: trio.SocketStream,
        *,
        deadline_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> tuple[trio.abc.Stream, Peer]:
        """The stream over ``transport`` and who is on its other side, within ``deadline_s`` seconds.

        The first byte tells which kind of proof the source offers. Takes the transport over: on any error or cancellation
        it is closed. Raises AuthenticationError, WireError, PeerSilentError, ``trio.BrokenResourceError``, OSError.
        """
        deadline = trio.current_time() + deadline_s
        try:
            first = None
            with trio.move_on_at(deadline):
                await self.refresh()
                first = await transport.socket.recv(1, socket.MSG_PEEK)
            if first is None:
                raise PeerSilentError(f"nothing came in {deadline_s:g} s")
            if not first:
                raise trio.BrokenResourceError("the other side closed the connection at once")
            is_tls = first[0] == FIRST_BYTE
            await self._check_kind(transport, deadline, is_tls=is_tls)
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise
        rest_s = max(0.0, deadline - trio.current_time())
        certificates = self.loaded.certificates
        if is_tls and certificates is not None:
            try:
                secured = await secure_stream(
                    transport,
                    certificates.context,
                    server_name=None,
                    deadline_s=rest_s,
                    idle_timeout_s=idle_timeout_s,
                )
            except AuthenticationError as error:
                _blame_own(certificates, error)
                raise
            return secured, CertificatePeer(secured.peer_names, self._allowed)
        stream = await accept_stream(
            transport,
            self.loaded.keys,
            deadline_s=rest_s,
            idle_timeout_s=idle_timeout_s,
            suites=_SUITES[self._config.dr_cipher],
        )
        return stream, KeyPeer(stream.peer_key)

    async def _check_kind(
        self, transport: trio.SocketStream, deadline: float, *, is_tls: bool
    ) -> None:
        """Raise WireError, and tell the other side, where this receiver takes no proof of this kind."""
        if is_tls and self.loaded.certificates is None:
            alert = Alert.MALFORMED
            text = (
                "the source offers TLS, but this receiver takes pre-shared keys only"
                " (dr_auth_cert, dr_auth_key and dr_ca_cert are not set)"
            )
        elif not is_tls and not self.loaded.keys:
            alert = Alert.CERTIFICATE_WANTED
            text = (
                "the source offers a pre-shared key, or something else, but this receiver takes certificates only"
                " (dr_auth_token is not set)"
            )
        else:
            return
        with trio.move_on_at(deadline):
            # What is not read when the connection closes would cut off what is sent.
            await transport.receive_some(MESSAGE_BYTES_MAX)
            await transport.send_all(alert_message(alert))
        raise WireError(text)


def _blame_own(certificates: Certificates, error: AuthenticationError) -> None:
    """Raise the error anew with what is known here: a source that refuses this side's certificate cannot say much about it."""
    try:
        certificates.check_own(time.time())
    except AuthenticationError as own:
        raise AuthenticationError(f"{error}: {own}") from error
