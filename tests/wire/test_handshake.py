# SPDX-License-Identifier: AGPL-3.0-or-later
"""The handshake's rules: bytes in, bytes or a typed error out."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import AuthenticationError, WireError
from replicator.wire import handshake as module
from replicator.wire.handshake import (
    TRANSITIONS,
    Alert,
    ClientHandshake,
    Event,
    Offer,
    ServerHandshake,
    Session,
    State,
    alert_message,
)
from replicator.wire.keys import Keyring, PreSharedKey

KEY = PreSharedKey.from_hex(hashlib.sha256(b"key").hexdigest(), vm="web")
OTHER = PreSharedKey.from_hex(hashlib.sha256(b"other key").hexdigest())
# Another secret under the same hint: what an attacker who saw a hint can make.
FORGED = PreSharedKey.from_hex(hashlib.sha256(b"forged").hexdigest())
object.__setattr__(FORGED, "hint", KEY.hint)

HEAD = struct.Struct(">4sBBH")
LOW_ORDER = (bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f")
Party = ClientHandshake | ServerHandshake


def message(kind: int, body: bytes, *, magic: bytes = b"RPLW", reserved: int = 0) -> bytes:
    return HEAD.pack(magic, kind, reserved, len(body)) + body


def alert(code: int) -> bytes:
    return message(Event.ALERT, bytes([code]))


def finish(client: ClientHandshake, server: ServerHandshake) -> tuple[Session, Session]:
    server.receive_data(client.receive_data(server.receive_data(client.start())))
    assert client.session is not None
    assert server.session is not None
    return client.session, server.session


def in_state(state: State) -> Party:
    """A party brought into a state by legal steps."""
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    if state is State.CLIENT_START:
        return client
    if state is State.SERVER_WAITS_HELLO:
        return server
    hello = client.start()
    if state is State.CLIENT_WAITS_HELLO:
        return client
    if state is State.FAILED:
        with pytest.raises(WireError):
            client.receive_data(b"GET / HTTP/1.1\r\n")
        return client
    reply = server.receive_data(hello)
    if state is State.SERVER_WAITS_PROOF:
        return server
    client.receive_data(reply)
    return client


def error_of(party: Party, data: bytes) -> WireError:
    """The error that the bytes cause; checks what holds after every error."""
    with pytest.raises(WireError) as caught:
        party.receive_data(data)
    assert party.state is State.FAILED
    assert party.session is None
    assert party.trailing_data == b""
    with pytest.raises(WireError, match="already failed"):
        party.receive_data(b"")
    assert_no_secret(caught.value)
    return caught.value


def assert_no_secret(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error)) + repr(error.args)
    for key in (KEY, OTHER, FORGED):
        assert key.secret.hex() not in text
        assert repr(key.secret)[2:-1] not in text


def test_both_sides_end_with_the_same_keys_crossed_and_the_key_that_was_proved() -> None:
    client, server = finish(ClientHandshake(KEY), ServerHandshake(Keyring([OTHER, KEY])))
    assert client.send_key == server.receive_key
    assert client.receive_key == server.send_key
    assert client.send_key != client.receive_key
    assert client.session_id == server.session_id
    assert len(client.session_id) == 16
    assert server.peer_key is KEY
    assert (client.version, client.suite) == (server.version, server.suite) == (1, 2)


def test_two_sessions_of_one_key_share_nothing() -> None:
    first, _ = finish(ClientHandshake(KEY), ServerHandshake(Keyring([KEY])))
    second, _ = finish(ClientHandshake(KEY), ServerHandshake(Keyring([KEY])))
    for name in ("send_key", "receive_key", "session_id"):
        assert getattr(first, name) != getattr(second, name)


def test_repr_of_a_session_and_of_what_made_it_shows_no_key() -> None:
    session, _ = finish(ClientHandshake(KEY), ServerHandshake(Keyring([KEY])))
    shown = repr(session) + repr(module.Ephemeral.generate())
    for secret in (session.send_key, session.receive_key, KEY.secret):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


def test_the_messages_may_arrive_byte_by_byte_and_frames_may_follow_at_once() -> None:
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))

    def drip(party: Party, data: bytes) -> bytes:
        return b"".join(party.receive_data(data[i : i + 1]) for i in range(len(data)))

    proof = drip(client, drip(server, client.start()))
    assert drip(server, proof[:-1]) == b""
    assert server.trailing_data == b""
    assert server.receive_data(proof[-1:] + b"first frame") == b""
    assert server.trailing_data == b"first frame"
    assert client.trailing_data == b""


def test_a_hello_with_fields_of_a_later_version_is_understood_and_authenticated() -> None:
    client = ClientHandshake(KEY)
    hello = client.start()
    extended = message(Event.CLIENT_HELLO, hello[HEAD.size :] + b"a later field")
    server = ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(extended)
    assert server.state is State.SERVER_WAITS_PROOF
    # This client did not send those bytes: somebody on the way did, and it shows.
    assert isinstance(error_of(client, reply), AuthenticationError)


# --- the table ---------------------------------------------------------------------------------


def good_body(event: Event) -> bytes:
    bodies = {
        Event.START: b"",
        Event.CLIENT_HELLO: ClientHandshake(KEY).start()[HEAD.size :],
        Event.SERVER_HELLO: bytes(100),
        Event.CLIENT_PROOF: bytes(32),
        Event.ALERT: b"\x01",
    }
    return bodies[event]


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pair
        for pair in itertools.product(State, Event)
        if (pair not in TRANSITIONS or pair[1] is Event.START)
        and pair[0] not in {State.DONE, State.FAILED}
    ],
)
def test_every_message_that_the_table_does_not_list_is_refused_by_its_head(
    state: State, event: Event
) -> None:
    party = in_state(state)
    error = error_of(party, message(event, good_body(event))[: HEAD.size])
    assert f"message type {int(event)} while the {state.value}" in str(error)
    assert party.alert == alert(Alert.MALFORMED)


@pytest.mark.parametrize("kind", [5, 22, 255])
def test_an_unknown_message_type_is_refused_by_its_head(kind: int) -> None:
    error_of(in_state(State.SERVER_WAITS_HELLO), message(kind, b"x")[: HEAD.size])


def test_start_is_for_once_and_a_finished_handshake_takes_no_bytes() -> None:
    client = in_state(State.DONE)
    assert isinstance(client, ClientHandshake)
    with pytest.raises(RuntimeError):
        client.start()
    with pytest.raises(RuntimeError):
        client.receive_data(b"frame")


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "kind", "length"),
    [
        (State.SERVER_WAITS_HELLO, 1, 0),
        (State.SERVER_WAITS_HELLO, 1, 1017),
        (State.SERVER_WAITS_HELLO, 1, 65535),
        (State.CLIENT_WAITS_HELLO, 2, 99),
        (State.CLIENT_WAITS_HELLO, 2, 101),
        (State.SERVER_WAITS_PROOF, 3, 31),
        (State.SERVER_WAITS_PROOF, 3, 33),
        (State.CLIENT_WAITS_HELLO, 4, 0),
        (State.CLIENT_WAITS_HELLO, 4, 2),
    ],
)
def test_a_message_of_another_length_is_refused_before_its_body_comes(
    state: State, kind: int, length: int
) -> None:
    party = in_state(state)
    error_of(party, HEAD.pack(b"RPLW", kind, 0, length))


def test_a_hello_of_the_greatest_length_is_accepted() -> None:
    hello = ClientHandshake(KEY).start()
    body = hello[HEAD.size :].ljust(1024 - HEAD.size, b"\0")
    assert ServerHandshake(Keyring([KEY])).receive_data(message(1, body))


@pytest.mark.parametrize(
    "body",
    [
        b"\0",
        b"\1",
        b"\1\0",
        b"\1\0\1",
        b"\1\0\1\0",
        b"\1\0\1\1\0",
        b"\1\0\1\1\0\1" + bytes(71),
        b"\x11" + bytes(34) + b"\1\0\1" + bytes(72),
        b"\1\0\1\xff" + bytes(1000),
    ],
)
def test_a_malformed_hello_is_refused(body: bytes) -> None:
    party = in_state(State.SERVER_WAITS_HELLO)
    assert "malformed" in str(error_of(party, message(1, body)))
    assert party.alert == alert(Alert.MALFORMED)


@pytest.mark.parametrize("state", [State.CLIENT_WAITS_HELLO, State.SERVER_WAITS_HELLO])
@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"RPLX" + bytes(4),
     message(4, b"\1", reserved=1)],
)  # fmt: skip
def test_another_protocol_is_refused(state: State, data: bytes) -> None:
    assert "does not speak this protocol" in str(error_of(in_state(state), data))


# --- keys --------------------------------------------------------------------------------------


def test_a_client_with_the_wrong_key_says_token_mismatch_and_tells_the_server() -> None:
    client, server = ClientHandshake(OTHER), ServerHandshake(Keyring([KEY]))
    error = error_of(client, server.receive_data(client.start()))
    assert isinstance(error, AuthenticationError)
    assert "token mismatch between source and receiver" in str(error)
    error = error_of(server, client.alert)
    assert isinstance(error, AuthenticationError)
    assert "not proven" in str(error)
    assert server.alert == b""


@pytest.mark.parametrize("key", [FORGED, OTHER], ids=["wrong key", "unknown hint"])
def test_an_unknown_hint_is_answered_just_as_a_wrong_key(key: PreSharedKey) -> None:
    server = ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(ClientHandshake(key).start())
    assert HEAD.unpack_from(reply) == (b"RPLW", 2, 0, 100)
    error = error_of(server, message(3, bytes(32)))
    assert isinstance(error, AuthenticationError)
    assert str(error) == (
        "token mismatch between source and receiver: the client proved no key known here"
    )
    assert server.alert == alert(Alert.AUTHENTICATION)


def test_even_who_guesses_the_decoy_gets_no_session() -> None:
    ring = Keyring([KEY])
    decoy, _ = ring.find(OTHER.hint)
    client, server = ClientHandshake(decoy), ServerHandshake(ring)
    proof = client.receive_data(server.receive_data(client.start()))
    assert isinstance(error_of(server, proof), AuthenticationError)


def test_unknown_hint_and_wrong_key_cost_the_same_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def operations(key: PreSharedKey) -> list[str]:
        calls: list[str] = []

        def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                calls.append(name)
                return real(*args, **kwargs)

            return call

        hello = ClientHandshake(key).start()
        server = ServerHandshake(Keyring([KEY]))
        with monkeypatch.context() as patch:
            for name in ("_derive", "_transcript", "_server_proof", "_client_proof"):
                patch.setattr(module, name, counted(name, getattr(module, name)))
            patch.setattr(hmac, "compare_digest", counted("compare", lambda *_: False))
            server.receive_data(hello)
            with pytest.raises(AuthenticationError):
                server.receive_data(message(3, bytes(32)))
        return calls

    assert operations(FORGED) == operations(OTHER)
    assert operations(KEY)[-1] == "compare"


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_public_key_of_low_order_is_refused_by_either_side(point: bytes) -> None:
    hello = ClientHandshake(KEY).start()
    server = ServerHandshake(Keyring([KEY]))
    assert "weak public key" in str(error_of(server, hello[:-40] + point + hello[-8:]))
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(client.start())
    assert "weak public key" in str(error_of(client, reply[:-64] + point + reply[-32:]))


# --- somebody in the middle --------------------------------------------------------------------


def test_every_bit_of_the_handshake_is_authenticated() -> None:
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    hello = client.start()
    proof_bytes = len(client.receive_data(server.receive_data(hello)))

    def meddle(which: int, bit: int) -> bool:
        """Whether both sides got a session although a bit was turned."""
        client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))

        def pass_on(number: int, data: bytes) -> bytes:
            if number != which:
                return data
            turned = bytearray(data)
            turned[bit // 8] ^= 1 << bit % 8
            return bytes(turned)

        try:
            reply = server.receive_data(pass_on(0, client.start()))
            proof = client.receive_data(pass_on(1, reply))
            server.receive_data(pass_on(2, proof))
        except WireError:
            return False
        return client.session is not None and server.session is not None

    sizes = (len(hello), HEAD.size + 100, proof_bytes)
    assert meddle(-1, 0)
    for which, size in enumerate(sizes):
        assert [bit for bit in range(size * 8) if meddle(which, bit)] == []


@pytest.mark.parametrize(
    ("offer", "stripped"),
    [
        (Offer(versions=(2, 1)), Offer(versions=(1,))),
        (Offer(suites=(2, 1)), Offer(suites=(1,))),
        (Offer(suites=(2, 1)), Offer(suites=(1, 2))),
        (Offer(suites=(2,)), Offer(suites=(2, 1))),
        (Offer(versions=(2, 1)), Offer(versions=(1, 1))),
        (Offer(), Offer(versions=(1, 2))),
    ],
)
def test_who_strips_or_adds_versions_or_suites_on_the_way_is_found_out(
    offer: Offer, stripped: Offer
) -> None:
    client = ClientHandshake(KEY, offer=offer)
    server = ServerHandshake(Keyring([KEY]), suites=(2, 1))
    fixed = client.start()[-72:]
    lists = b"".join(
        struct.pack(f">B{len(values)}H", len(values), *values)
        for values in (stripped.versions, stripped.suites)
    )
    reply = server.receive_data(message(1, lists + fixed))
    assert isinstance(error_of(client, reply), AuthenticationError)


def test_of_several_versions_the_one_both_speak_is_chosen() -> None:
    client = ClientHandshake(KEY, offer=Offer(versions=(7, 1), suites=(9, 2)))
    session, _ = finish(client, ServerHandshake(Keyring([KEY])))
    assert (session.version, session.suite) == (1, 2)


@pytest.mark.parametrize(
    ("offered", "taken", "chosen"),
    [((2,), (2,), 2), ((2,), (2, 1), 2), ((1,), (2, 1), 1), ((1, 2), (2, 1), 2)],
)
def test_the_servers_best_suite_is_chosen_of_those_that_both_speak(
    offered: tuple[int, ...], taken: tuple[int, ...], chosen: int
) -> None:
    client, server = finish(
        ClientHandshake(KEY, offer=Offer(suites=offered)),
        ServerHandshake(Keyring([KEY]), suites=taken),
    )
    assert (client.suite, server.suite) == (chosen, chosen)


@pytest.mark.parametrize("choice", [(2, 2), (1, 1), (0, 0)])
def test_a_choice_that_was_not_offered_is_refused(choice: tuple[int, int]) -> None:
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(client.start())
    error = error_of(client, reply[:8] + struct.pack(">HH", *choice) + reply[12:])
    assert "not offered" in str(error)


@pytest.mark.parametrize(
    ("offer", "code", "text", "there"),
    [
        (
            Offer(versions=(2,)),
            Alert.NO_COMMON_VERSION,
            "no protocol version in common with the client",
            "no protocol version in common",
        ),
        (
            Offer(suites=(1, 9)),
            Alert.NO_COMMON_SUITE,
            "dr_cipher is none or suite 9 on the source and aes-256-gcm on the receiver",
            "dr_cipher differs on source and receiver",
        ),
    ],
)
def test_without_anything_in_common_both_sides_say_so(
    offer: Offer, code: Alert, text: str, there: str
) -> None:
    client, server = ClientHandshake(KEY, offer=offer), ServerHandshake(Keyring([KEY]))
    assert text in str(error_of(server, client.start()))
    assert server.alert == alert(code)
    error = error_of(client, server.alert)
    assert there in str(error)
    assert "not proven" in str(error)
    assert not isinstance(error, AuthenticationError)


def test_a_receiver_that_takes_certificates_only_can_say_so() -> None:
    told = alert_message(Alert.CERTIFICATE_WANTED)
    assert told == alert(5)
    assert "dr_auth_cert" in str(error_of(in_state(State.CLIENT_WAITS_HELLO), told))


def test_an_alert_of_a_later_version_is_reported_by_number() -> None:
    assert "alert 200" in str(error_of(in_state(State.CLIENT_WAITS_HELLO), alert(200)))


def test_a_recorded_client_cannot_be_played_again() -> None:
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    hello = client.start()
    proof = client.receive_data(server.receive_data(hello))
    server.receive_data(proof)
    victim = ServerHandshake(Keyring([KEY]))
    victim.receive_data(hello)
    assert isinstance(error_of(victim, proof), AuthenticationError)


def test_a_recorded_server_cannot_be_played_again() -> None:
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(client.start())
    victim = ClientHandshake(KEY)
    victim.start()
    assert isinstance(error_of(victim, reply), AuthenticationError)


def test_what_a_side_sent_cannot_be_reflected_to_it() -> None:
    client = ClientHandshake(KEY)
    error_of(client, client.start())
    client, server = ClientHandshake(KEY), ServerHandshake(Keyring([KEY]))
    reply = server.receive_data(client.start())
    # Not even the server's proof under the client's message type: the labels differ.
    assert isinstance(error_of(server, message(3, reply[-32:])), AuthenticationError)


# --- anything at all ---------------------------------------------------------------------------


@given(
    state=st.sampled_from([s for s in State if s not in {State.DONE, State.FAILED}]),
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=1100),
            st.builds(message, st.integers(0, 5), st.binary(max_size=200)),
        ),
        max_size=8,
    ),
)
def test_random_bytes_give_wire_errors_only_and_never_a_session(
    state: State, pieces: list[bytes]
) -> None:
    party = in_state(state)
    try:
        for piece in pieces:
            party.receive_data(piece)
            # What is kept between calls is less than one message.
            assert len(party._buffer) < 1024
    except WireError as error:
        assert_no_secret(error)
        assert not party._buffer
    assert party.session is None
