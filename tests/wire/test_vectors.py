# SPDX-License-Identifier: AGPL-3.0-or-later
"""A whole session with fixed randomness, byte for byte: the format cannot change unnoticed.

The keys are derived here a second time with nothing but ``hmac`` and ``hashlib``, as
docs/wire.md says it; the X25519 values are those of RFC 7748, section 6.1.
"""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from replicator.wire import frames
from replicator.wire.frames import FrameSealer
from replicator.wire.handshake import ClientHandshake, Ephemeral, Offer, ServerHandshake
from replicator.wire.keys import Keyring, PreSharedKey

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
PSK = bytes(range(32))
CLIENT_NONCE, SERVER_NONCE = b"\xc1" * 32, b"\x5e" * 32


def mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def hkdf(salt: bytes, secret: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869."""
    extracted, block, out = mac(salt, secret), b"", b""
    for counter in range(1, -(-size // 32) + 1):
        block = mac(extracted, block, info, bytes([counter]))
        out += block
    return out[:size]


def ephemeral(private: bytes, nonce: bytes) -> Ephemeral:
    return Ephemeral(X25519PrivateKey.from_private_bytes(private), nonce)


CLIENT_HELLO = (
    b"RPLW\x01\x00\x00\x4e"
    b"\x01\x00\x01"
    b"\x01\x00\x01" + CLIENT_NONCE + ALICE_PUBLIC + mac(PSK, b"replctl key hint")[:8]
)
SERVER_UNSIGNED = b"RPLW\x02\x00\x00\x64\x00\x01\x00\x01" + SERVER_NONCE + BOB_PUBLIC
TRANSCRIPT = hashlib.sha256(b"replctl wire v1 hellos\0" + CLIENT_HELLO + SERVER_UNSIGNED).digest()
KEYS = hkdf(TRANSCRIPT, b"\x00\x20" + PSK + SHARED, b"replctl wire v1 session keys", 144)
SERVER_PROOF = mac(KEYS[0:32], b"replctl wire v1 server proof\0", TRANSCRIPT)
CLIENT_PROOF = mac(KEYS[32:64], b"replctl wire v1 client proof\0", TRANSCRIPT, SERVER_PROOF)


def test_a_whole_session_is_byte_for_byte_as_the_document_says() -> None:
    key = PreSharedKey.from_hex(PSK.hex())
    client = ClientHandshake(
        key, offer=Offer(suites=(1,)), ephemeral=ephemeral(ALICE, CLIENT_NONCE)
    )
    server = ServerHandshake(Keyring([key]), suites=(1,), ephemeral=ephemeral(BOB, SERVER_NONCE))
    assert client.start() == CLIENT_HELLO
    assert server.receive_data(CLIENT_HELLO) == SERVER_UNSIGNED + SERVER_PROOF
    proof = client.receive_data(SERVER_UNSIGNED + SERVER_PROOF)
    assert proof == b"RPLW\x03\x00\x00\x20" + CLIENT_PROOF
    assert server.receive_data(proof) == b""
    assert client.session is not None
    assert client.session.send_key == KEYS[64:96]
    assert client.session.receive_key == KEYS[96:128]
    assert client.session.session_id == KEYS[128:144]

    sealer = FrameSealer(client.session.send_key)
    first = bytes(8) + b"\x00\x00\x00\x05\x01"
    assert sealer.seal(b"hello") == first[8:] + b"hello" + mac(KEYS[64:96], first, b"hello")
    second = bytes(7) + b"\x01" + b"\x00\x00\x00\x00\x02"
    assert sealer.seal_close() == second[8:] + mac(KEYS[64:96], second)

    sealer = FrameSealer(client.session.send_key, sealed=True)
    cipher = AESGCM(KEYS[64:96])
    assert sealer.seal(b"hello") == first[8:] + cipher.encrypt(bytes(12), b"hello", first)
    assert sealer.seal_close() == second[8:] + cipher.encrypt(bytes(11) + b"\x01", b"", second)


def test_the_next_frame_key_is_as_the_document_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAMES_PER_KEY", 1)
    sealer = FrameSealer(KEYS[64:96], sealed=True)
    sealer.seal(b"under the first key")
    # RFC 5869, 2.3: the expansion alone, of one block.
    key = mac(KEYS[64:96], b"replctl wire v1 next frame key", b"\x01")
    second = bytes(7) + b"\x01" + b"\x00\x00\x00\x05\x01"
    sealed = AESGCM(key).encrypt(bytes(11) + b"\x01", b"hello", second)
    assert sealer.seal(b"hello") == second[8:] + sealed


def test_the_derived_values_are_frozen() -> None:
    """Guards the second implementation above against being changed along with the first."""
    assert (
        hashlib.sha256(CLIENT_HELLO).hexdigest()
        == "f9495398787078f9e1b751f9f855112dd1a453ae5c0c537c3b03764102ea7e86"
    )
    assert SERVER_PROOF.hex() == "eb1f85afceff43d47cc265fd5bfde0a372d4e1488825cbcb5d44341d766672b1"
    assert CLIENT_PROOF.hex() == "6ad3602588242980ddda80f9133d2fe5fbbb60f394e85985a21887bfb45bc6e8"
    assert KEYS[64:96].hex() == "e95bcc3052a81186f8c9965d14a31f5e82615a62cfa832e8a549d92b48eadc71"
    assert KEYS[96:128].hex() == "0397c2d0330744d175ffdde24ffd88146a9267cd4f3dcc1ecf7da6129706babe"
    assert KEYS[128:].hex() == "fdc591a63b815027039cf76952a569f4"
