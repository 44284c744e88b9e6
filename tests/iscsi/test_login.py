# SPDX-License-Identifier: AGPL-3.0-or-later
"""The login as a machine: responses in, requests or an end out, without a socket."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.iscsi import (
    Chap,
    IscsiError,
    IscsiSettings,
    LoginAuthenticationError,
    LoginNotFoundError,
    LoginRefusedError,
    Portal,
    TargetNotTrustedError,
)
from replicator.iscsi.keys import decode_binary, decode_text, encode_text
from replicator.iscsi.login import ROUNDS_MAX, LoggedIn, Login, Redirected, Send
from replicator.iscsi.pdu import LoginResponse, PduError
from tests.iscsi.lab import INITIATOR, TARGET

ISID = b"\x80abcde"
CHALLENGE = bytes(range(1, 17))
CHAP = Chap("alice", "secretsecret1")
MUTUAL = Chap("alice", "secretsecret1", "target-a", "othersecret12")


def login(chap: Chap | None = None, target: str | None = TARGET) -> Login:
    return Login(
        IscsiSettings(INITIATOR, chap), target, where="the target", isid=ISID, challenge=CHALLENGE
    )


def sent(send: object) -> tuple[int, dict[str, str]]:
    """Flags and keys of a request."""
    assert isinstance(send, Send)
    return send.data[1], dict(decode_text(send.data[48:]))


def response(
    flags: int,
    *,
    status: int = 0,
    tsih: int = 7,
    isid: bytes = ISID,
    itt: int = 0,
    version: int = 0,
) -> LoginResponse:
    return LoginResponse(
        data_length=0,
        itt=itt,
        stat_sn=41,
        exp_cmd_sn=1,
        max_cmd_sn=8,
        transit=bool(flags & 0x80),
        more=bool(flags & 0x40),
        stage=flags >> 2 & 3,
        next_stage=flags & 3,
        version=version,
        isid=isid,
        tsih=tsih,
        status=status,
    )


def text(**keys: str) -> bytes:
    return encode_text(keys.items())


def in_operational(machine: Login) -> dict[str, str]:
    """Through the security stage without CHAP; the parameters that were offered."""
    flags, _ = sent(machine.begin())
    assert flags == 0x81
    flags, keys = sent(machine.receive(response(0x81), text(AuthMethod="None")))
    assert flags == 0x87
    return keys


def test_without_chap() -> None:
    machine = login()
    flags, keys = sent(machine.begin())
    assert keys == {
        "InitiatorName": INITIATOR,
        "SessionType": "Normal",
        "TargetName": TARGET,
        "AuthMethod": "None",
    }
    flags, keys = sent(
        machine.receive(response(0x81), text(AuthMethod="None", TargetPortalGroupTag="1"))
    )
    assert (flags, keys["HeaderDigest"], keys["ErrorRecoveryLevel"]) == (0x87, "None,CRC32C", "0")
    end = machine.receive(
        response(0x87),
        text(HeaderDigest="CRC32C", DataDigest="None", MaxRecvDataSegmentLength="8192"),
    )
    assert isinstance(end, LoggedIn)
    assert (end.cmd_sn, end.max_cmd_sn, end.exp_stat_sn) == (1, 8, 42)
    assert (end.parameters.header_digest, end.parameters.data_digest) == (True, False)


def test_discovery_names_no_target_and_offers_less() -> None:
    machine = login(target=None)
    _, keys = sent(machine.begin())
    assert keys == {"InitiatorName": INITIATOR, "SessionType": "Discovery", "AuthMethod": "None"}
    _, keys = sent(machine.receive(response(0x81), b""))
    assert "MaxBurstLength" not in keys


@pytest.mark.parametrize(
    ("algorithm", "digest"), [("5", "md5"), ("7", "sha256"), ("8", "sha3_256")]
)
def test_chap_in_both_directions(algorithm: str, digest: str) -> None:
    machine = login(MUTUAL)
    flags, keys = sent(machine.begin())
    assert (flags, keys["AuthMethod"]) == (0x00, "CHAP")
    flags, keys = sent(machine.receive(response(0x00), text(AuthMethod="CHAP")))
    assert (flags, keys) == (0x00, {"CHAP_A": "5,7,8"})
    theirs = b"\x01their challenge"
    flags, keys = sent(
        machine.receive(
            response(0x00), text(CHAP_A=algorithm, CHAP_I="200", CHAP_C="0x" + theirs.hex())
        )
    )
    assert (flags, keys["CHAP_N"]) == (0x81, "alice")
    expected = hashlib.new(digest, bytes([200]) + b"secretsecret1" + theirs).digest()
    assert decode_binary(keys["CHAP_R"]) == expected
    assert decode_binary(keys["CHAP_C"]) == CHALLENGE
    proof = hashlib.new(digest, bytes([int(keys["CHAP_I"])]) + b"othersecret12" + CHALLENGE)
    answer = text(CHAP_N="target-a", CHAP_R="0x" + proof.hexdigest())
    flags, keys = sent(machine.receive(response(0x81), answer))
    assert (flags, keys["MaxConnections"]) == (0x87, "1")


def at_the_response(chap: Chap) -> Login:
    machine = login(chap)
    machine.begin()
    machine.receive(response(0x00), text(AuthMethod="CHAP"))
    machine.receive(response(0x00), text(CHAP_A="5", CHAP_I="1", CHAP_C="0xabcd"))
    return machine


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"CHAP_N": "target-a"},
        {"CHAP_N": "target-a", "CHAP_R": "0x" + "00" * 16},
        {"CHAP_N": "target-a", "CHAP_R": "0x00"},
    ],
)
def test_a_target_that_does_not_prove_itself(keys: dict[str, str]) -> None:
    with pytest.raises(TargetNotTrustedError):
        at_the_response(MUTUAL).receive(response(0x81), text(**keys))


def test_a_target_that_answers_and_stays_is_asked_to_move_on() -> None:
    machine = at_the_response(CHAP)
    assert sent(machine.receive(response(0x00), b""))[0] == 0x81
    assert sent(machine.receive(response(0x81), b""))[0] == 0x87


def test_mutual_chap_is_not_traded_for_none() -> None:
    machine = login(MUTUAL)
    machine.begin()
    with pytest.raises(TargetNotTrustedError, match="does no CHAP"):
        machine.receive(response(0x00), text(AuthMethod="None"))


def test_our_own_challenge_is_not_answered() -> None:
    machine = login(MUTUAL)
    machine.begin()
    machine.receive(response(0x00), text(AuthMethod="CHAP"))
    with pytest.raises(PduError, match="our own"):
        machine.receive(response(0x00), text(CHAP_A="5", CHAP_I="1", CHAP_C="0x" + CHALLENGE.hex()))


@pytest.mark.parametrize(
    "keys",
    [
        {"CHAP_A": "6", "CHAP_I": "1", "CHAP_C": "0xab"},
        {"CHAP_A": "5", "CHAP_I": "256", "CHAP_C": "0xab"},
        {"CHAP_A": "5", "CHAP_I": "-1", "CHAP_C": "0xab"},
        {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "ab"},
        {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x"},
        {"CHAP_A": "5", "CHAP_I": "1", "CHAP_C": "0x" + "ab" * 1025},
        {"CHAP_A": "5", "CHAP_I": "1"},
    ],
)
def test_a_malformed_challenge(keys: dict[str, str]) -> None:
    machine = login(CHAP)
    machine.begin()
    machine.receive(response(0x00), text(AuthMethod="CHAP"))
    with pytest.raises(PduError):
        machine.receive(response(0x00), text(**keys))


def test_what_the_target_proposes_is_answered() -> None:
    machine = login()
    in_operational(machine)
    flags, keys = sent(
        machine.receive(
            response(0x04), text(FirstBurstLength="65536", OFMarker="No", TargetAlias="x", Odd="1")
        )
    )
    assert flags == 0x87
    assert keys == {"FirstBurstLength": "Irrelevant", "OFMarker": "No", "Odd": "NotUnderstood"}
    assert isinstance(machine.receive(response(0x87), b""), LoggedIn)


def test_text_in_several_parts() -> None:
    machine = login()
    in_operational(machine)
    whole = text(HeaderDigest="CRC32C", DataDigest="CRC32C")
    assert sent(machine.receive(response(0x44), whole[:9])) == (0x04, {})
    assert sent(machine.receive(response(0x04), whole[9:])) == (0x87, {})
    end = machine.receive(response(0x87), b"")
    assert isinstance(end, LoggedIn)
    assert end.parameters.data_digest


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (0x0201, LoginAuthenticationError),
        (0x0202, LoginAuthenticationError),
        (0x0203, LoginNotFoundError),
        (0x0204, LoginNotFoundError),
        (0x0301, LoginRefusedError),
        (0x0F0F, LoginRefusedError),
    ],
)
def test_refusals(status: int, kind: type[LoginRefusedError]) -> None:
    machine = login()
    machine.begin()
    with pytest.raises(kind, match=f"the target refused.*0x{status:04x}") as caught:
        machine.receive(response(0, status=status, isid=bytes(6)), b"")
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("address", "portal"),
    [
        ("127.0.0.2:13261,1", Portal("127.0.0.2", 13261)),
        ("10.1.2.3", Portal("10.1.2.3", 3260)),
        ("[fe80::1]:3261", Portal("fe80::1", 3261)),
        ("cvm-1.example", Portal("cvm-1.example", 3260)),
    ],
)
def test_redirects(address: str, portal: Portal) -> None:
    machine = login()
    machine.begin()
    end = machine.receive(response(0, status=0x0101), text(TargetAddress=address))
    assert end == Redirected(portal)


def beginning(machine: Login) -> None:
    machine.begin()


@pytest.mark.parametrize(
    ("before", "unit", "data"),
    [
        (beginning, response(0, status=0x0101), b""),
        (beginning, response(0, status=0x0101), text(TargetAddress="not a host!")),
        (beginning, response(0x81, itt=5), b""),
        (beginning, response(0x81, isid=b"xxxxxx"), b""),
        (beginning, response(0x81, version=1), b""),
        (beginning, response(0x87), b""),  # another stage
        (beginning, response(0x83), b""),  # further than was asked for
        (beginning, response(0x81), b"no pair\0"),
        (beginning, response(0x81), b"\xff\xfe=1\0"),
        (beginning, response(0x81), b"A=1\0A=1\0"),
        (beginning, response(0x81), b"Key=" + b"x" * 9000),
        (beginning, response(0x81), text(AuthMethod="KRB5")),
        (beginning, response(0x81), text(AuthMethod="CHAP")),
        (in_operational, response(0x87, tsih=0), b""),
        (in_operational, response(0x87), text(HeaderDigest="MD5")),
        (in_operational, response(0x87), text(HeaderDigest="Reject")),
        (in_operational, response(0x87), text(InitialR2T="No")),
        (in_operational, response(0x87), text(ErrorRecoveryLevel="2")),
        (in_operational, response(0x87), text(DefaultTime2Wait="0")),
        (in_operational, response(0x87), text(MaxRecvDataSegmentLength="1")),
        (in_operational, response(0x87), text(MaxBurstLength="16777215")),
        (in_operational, response(0x87), text(MaxBurstLength="many")),
        (in_operational, response(0x87), text(Odd="1")),
    ],
)
def test_what_breaks_the_protocol(
    before: Callable[[Login], object], unit: LoginResponse, data: bytes
) -> None:
    machine = login()
    before(machine)
    with pytest.raises(PduError):
        machine.receive(unit, data)


def test_a_key_is_answered_once() -> None:
    machine = login()
    in_operational(machine)
    machine.receive(response(0x04), text(HeaderDigest="None"))
    with pytest.raises(PduError, match="second answer"):
        machine.receive(response(0x04), text(HeaderDigest="CRC32C"))


@pytest.mark.parametrize("flags", [0x04, 0x44])
def test_a_login_without_an_end_is_ended(flags: int) -> None:
    machine = login()
    in_operational(machine)
    for _ in range(ROUNDS_MAX - 2):
        assert isinstance(machine.receive(response(flags), b""), Send)
    with pytest.raises(PduError, match="without an end"):
        machine.receive(response(flags), b"")


def test_text_without_an_end_is_ended() -> None:
    machine = login()
    in_operational(machine)
    for _ in range(8):
        machine.receive(response(0x44), b"x" * 8000)
    with pytest.raises(PduError, match="too much text"):
        machine.receive(response(0x44), b"x" * 8000)


KEYS = st.sampled_from(
    [
        "AuthMethod",
        "CHAP_A",
        "CHAP_I",
        "CHAP_C",
        "CHAP_N",
        "CHAP_R",
        "HeaderDigest",
        "MaxBurstLength",
        "TargetAddress",
        "Odd",
    ]
)
VALUES = st.sampled_from(
    ["None", "CHAP", "5", "0xab", "0bq80=", "Yes", "1", "16777216", "", "a:b:c", "Reject"]
)
DATA = st.one_of(
    st.binary(max_size=64),
    st.dictionaries(KEYS, VALUES, max_size=5).map(lambda keys: encode_text(keys.items())),
)
FLAGS = st.sampled_from([0x00, 0x40, 0x81, 0x04, 0x44, 0x87, 0x83])
STATUS = st.sampled_from([0, 0, 0, 0, 0, 0x0101, 0x0201, 0x0300])


@given(st.sampled_from([None, CHAP, MUTUAL]), st.lists(st.tuples(FLAGS, STATUS, DATA), max_size=12))
def test_whatever_comes_the_machine_ends_or_asks(
    chap: Chap | None, script: list[tuple[int, int, bytes]]
) -> None:
    """Invariant: each response gives one request, an end, or one of the two kinds of error; no secret is in any."""
    machine = login(chap)
    outcome: object = machine.begin()
    for flags, status, data in script:
        try:
            outcome = machine.receive(response(flags, status=status), data)
        except (PduError, IscsiError) as error:
            outcome = str(error)
            break
        if not isinstance(outcome, Send):
            # Nobody gets past mutual CHAP by chance.
            assert isinstance(
                outcome, Redirected | (LoggedIn if chap is not MUTUAL else Redirected)
            )
            break
        assert b"secretsecret1" not in outcome.data
    assert "secret1" not in str(outcome)
