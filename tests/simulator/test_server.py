# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the simulator's server does whichever API is asked: TLS, accounts, sessions, rights, rates, bodies, restarts."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from replicator.errors import RefusedError, StateError, UsageError
from replicator.simulator.connection import BODY_MAX
from replicator.simulator.running import CREDENTIALS_FILE, running_simulator
from replicator.simulator.scenario import ClusterSpec, RoleSpec, UserSpec
from replicator.simulator.web import Request
from tests.limits import HANG_S
from tests.simulator.lab import Client, small_scenario, small_simulator

CLUSTERS = "/api/clustermgmt/v4.0/config/clusters"
GROUPS = "/api/volumes/v4.0/config/volume-groups"


async def test_prism_central_and_each_element_answer_under_one_authority(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator) as client:
            central = await client.ask("GET", CLUSTERS)
        assert central.status == 200
        assert {each["name"] for each in central.json["data"]} >= {"cluster-a", "cluster-b"}
        assert central.headers["x-ntnx-env"] == "pc"
        for cluster in simulator.world.clusters.values():
            async with Client(simulator, host=cluster.address) as client:
                element = await client.ask("GET", CLUSTERS)
            assert (element.status, element.headers["x-ntnx-env"]) == (404, "pe")


async def test_a_client_that_does_not_trust_the_authority_is_not_answered(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        tcp = await trio.open_tcp_stream(simulator.address, simulator.port)
        stream = trio.SSLStream(
            tcp, ssl.create_default_context(), server_hostname=simulator.address
        )
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.do_handshake()
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        await trio.aclose_forcefully(stream)
        # Others are served all the same.
        async with Client(simulator) as client:
            assert (await client.ask("GET", CLUSTERS)).status == 200


async def test_a_connection_is_kept_and_a_cookie_stands_for_the_password(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator) as client:
            first = await client.ask("GET", CLUSTERS)
            assert (await client.ask("GET", CLUSTERS)).status == 200
        cookie = first.headers["set-cookie"].partition(";")[0]
        assert cookie.startswith("NTNX_IAM_SESSION=")
        async with Client(simulator, user=None) as client:
            assert (await client.ask("GET", CLUSTERS)).status == 401
            again = await client.ask("GET", CLUSTERS, headers={"Cookie": cookie})
            assert again.status == 200
            assert "set-cookie" not in again.headers
        # A session of Prism Central is none on an Element.
        element = simulator.cluster("cluster-a").address
        value = cookie.partition("=")[2]
        async with Client(simulator, user=None, host=element) as client:
            headers = {"Cookie": f"NTNX_IGW_SESSION={value}"}
            assert (await client.ask("GET", CLUSTERS, headers=headers)).status == 401


async def test_a_session_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async with small_simulator(tmp_path, knobs={"session_lifetime_s": 0}) as simulator:
        async with Client(simulator) as client:
            cookie = (await client.ask("GET", CLUSTERS)).headers["set-cookie"].partition(";")[0]
            # Both: the password counts where the session does not.
            assert (await client.ask("GET", CLUSTERS, headers={"Cookie": cookie})).status == 200
        async with Client(simulator, user=None) as client:
            refused = await client.ask("GET", CLUSTERS, headers={"Cookie": cookie})
            assert refused.status == 401
            assert refused.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "given", ["", "Basic !", "Basic YWRtaW46bm8=", "Basic YWRtaW4=", "Digest x"]
)
async def test_who_is_not_known_gets_401_in_html(tmp_path: Path, given: str) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator, user=None) as client:
        answer = await client.ask(
            "GET", CLUSTERS, headers={"Authorization": given} if given else {}
        )
        assert answer.status == 401
        assert answer.body.startswith(b"<!DOCTYPE html>")


async def test_an_api_key_is_good_and_another_is_not(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator, user=None) as client:
        simulator.user("viewer").keys["k1"] = "key-of-a-viewer"
        good = await client.ask("GET", CLUSTERS, headers={"X-ntnx-api-key": "key-of-a-viewer"})
        assert good.status == 200
        assert (await client.ask("GET", CLUSTERS, headers={"X-ntnx-api-key": "no"})).status == 401


async def test_an_account_of_prism_central_alone_is_unknown_on_an_element(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator, user="central-only") as client:
            assert (await client.ask("GET", CLUSTERS)).status == 200
        element = simulator.cluster("cluster-a").address
        async with Client(simulator, user="central-only", host=element) as client:
            assert (await client.ask("GET", CLUSTERS)).status == 401


async def test_a_role_without_the_operation_is_told_which_it_lacks(tmp_path: Path) -> None:
    users = [
        UserSpec(name="admin", role="Super Admin"),
        UserSpec(name="looker", role="Looker", password="looks-only"),
    ]
    roles = [RoleSpec(name="Looker", operations=["View_Cluster"])]
    async with (
        small_simulator(tmp_path, users=users, roles=roles) as simulator,
        Client(simulator, user="looker") as client,
    ):
        assert simulator.password("looker") == "looks-only"
        assert (await client.ask("GET", CLUSTERS)).status == 200
        refused = await client.ask("GET", GROUPS)
        assert refused.status == 403
        assert b"View_Volume_Group_Details" in refused.body


async def test_only_who_may_do_everything_turns_the_simulators_own_knobs(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator, user="prism-admin") as client:
            assert (await client.ask("POST", "/simulator/knobs", {"a": 1})).status == 403
        async with Client(simulator) as client:
            assert (await client.ask("POST", "/simulator/knobs", {"a": 1})).json == {
                "knobs": {"a": 1}
            }
            assert simulator.core.knobs["a"] == 1
            await client.ask("GET", CLUSTERS)
            log = (await client.ask("GET", "/simulator/requests")).json["requests"]
        assert log[-1] == {"method": "GET", "path": CLUSTERS, "status": 200, "cluster": None}


async def test_more_requests_than_the_rate_allows_are_told_when_to_come_back(
    tmp_path: Path,
) -> None:
    knobs = {"rate_limit_rpm": 1, "rate_limit_burst": 2}
    async with small_simulator(tmp_path, knobs=knobs) as simulator:
        async with Client(simulator) as client:
            assert [(await client.ask("GET", CLUSTERS)).status for _ in range(2)] == [200, 200]
            limited = await client.ask("GET", CLUSTERS)
            assert limited.status == 429
            assert 0 < int(limited.headers["retry-after"]) <= 60
        # Another account has a bucket of its own.
        async with Client(simulator, user="viewer") as client:
            assert (await client.ask("GET", CLUSTERS)).status == 200


async def test_a_body_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        answer = await client.ask("POST", GROUPS, b" " * (BODY_MAX + 1))
        assert answer.status == 413
        # What was left of it was read: the connection is still good.
        assert (await client.ask("GET", CLUSTERS)).status == 200


async def test_what_is_no_http_is_refused(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        context = ssl.create_default_context(cafile=str(simulator.ca_path))
        tcp = await trio.open_tcp_stream(simulator.address, simulator.port)
        async with trio.SSLStream(
            tcp, context, server_hostname=simulator.address, https_compatible=True
        ) as stream:
            await stream.send_all(b"\x00\x01 no\r\n\r\n")
            with trio.fail_after(HANG_S):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")


async def test_the_hook_sees_a_request_that_was_carried_out_before_its_answer_goes_out(
    tmp_path: Path,
) -> None:
    seen: list[tuple[str, str, str]] = []

    async def note(request: Request) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((request.method, request.path, request.user.name))

    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.server.on_request = note
        await client.ask("GET", f"{CLUSTERS}?%24limit=1")
        assert seen == [("GET", CLUSTERS, "admin")]


async def test_a_directory_goes_on_with_what_it_holds(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        guest = simulator.guest(simulator.vm("app01").uuid)
        await guest.write(4096, b"before the restart")
        address, password = simulator.address, simulator.password("admin")
        authority = simulator.ca_path.read_bytes()
        vm = simulator.vm("app01").uuid
    async with small_simulator(tmp_path) as simulator:
        assert (simulator.address, simulator.password("admin")) == (address, password)
        assert simulator.ca_path.read_bytes() == authority
        assert simulator.vm("app01").uuid == vm
        assert b"before the restart" in await simulator.guest(vm).content()
        async with Client(simulator) as client:
            assert (await client.ask("GET", CLUSTERS)).status == 200


async def test_nothing_that_is_secret_can_be_read_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    async with small_simulator(folder) as simulator:
        line = f"admin {simulator.password('admin')}\n"
        assert line in (folder / CREDENTIALS_FILE).read_text()
    assert folder.stat().st_mode & 0o077 == 0
    for path in folder.rglob("*"):
        if path.suffix == ".pem" or path.name in {CREDENTIALS_FILE, "admin", "world.json"}:
            assert path.stat().st_mode & 0o077 == 0, path


async def test_a_directory_has_one_simulator_at_a_time(tmp_path: Path) -> None:
    async with small_simulator(tmp_path):
        with pytest.raises(RefusedError, match="another simulator runs in"):
            async with small_simulator(tmp_path):
                pass


async def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    async with small_simulator(tmp_path / "a") as first:
        base = first.address.rpartition(".")[0] + ".0"
        with pytest.raises(StateError, match=f"{first.address}|tgtd"):
            async with running_simulator(tmp_path / "b", small_scenario(), base=base):
                pass


@pytest.mark.parametrize("base", ["10.0.0.0", "127.1.2.3", "here", "::1"])
async def test_a_base_that_is_no_network_of_loopback_is_refused(tmp_path: Path, base: str) -> None:
    with pytest.raises(UsageError):
        async with running_simulator(tmp_path, small_scenario(), base=base):
            pass


async def test_damaged_state_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_bytes(b"{")
    with pytest.raises(StateError, match=r"world\.json is damaged"):
        async with small_simulator(tmp_path):
            pass


async def test_a_cluster_without_data_services_has_no_portal(tmp_path: Path) -> None:
    clusters = [ClusterSpec(name="cluster-a", data_services=False, cvms=0)]
    async with small_simulator(tmp_path, clusters=clusters) as simulator:
        assert simulator.cluster("cluster-a").data_services is None
