# SPDX-License-Identifier: AGPL-3.0-or-later
"""A configuration that cannot work is refused in one line that names the key, and nothing is touched."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from replicator.config import NO_USE_ON_RECEIVER, NO_USE_ON_SOURCE
from replicator.state_dir import open_state_dir
from tests.cli.conftest import KEY, Replctl, source_values, write_config

CASES: list[tuple[dict[str, object], str]] = [
    ({"dr_hots": "x"}, r"unknown key dr_hots \(did you mean dr_host\?\)"),
    ({"zzz": "red"}, r"unknown key zzz$"),
    ({"push_interval": "soon"}, r"push_interval: expected a whole number from 1 to 31536000$"),
    ({"push_interval": 0}, r"push_interval: "),
    ({"dr_port": 65536}, r"dr_port: expected a whole number from 1 to 65535$"),
    ({"vcpu": "two"}, r"vcpu: expected a whole number from 1 to 1024$"),
    ({"prism_central": "x" * 256}, r"prism_central: expected 1 to 255 characters$"),
    ({"prism_central": "a\0b"}, r"prism_central: expected HOST or HOST:PORT$"),
    ({"push_apply_remote": "maybe"}, r"push_apply_remote: expected yes or no"),
    ({"state_dir": "relative/state"}, r"state_dir: expected an absolute path"),
    ({"source": "vmware"}, r"source: expected one of image, nutanix, qemu$"),
    ({"verbose": 4}, r"verbose: "),
    ({"max_bandwidth_mbps": 1_000_001}, r"max_bandwidth_mbps: expected a whole number from 0 to"),
    (
        {"max_bandwidth_schedule": "* 0; mon-frei 08:00-18:00 50"},
        r"max_bandwidth_schedule: 'mon-frei 08:00-18:00 50': frei is no day: expected mon, tue",
    ),
    ({"dr_timeout": 1}, r"dr_timeout: expected a whole number from 2 to 600"),
    ({"rpo_target": -1}, r"rpo_target: expected a whole number from 0 to 31536000"),
    ({"held_snapshots_max": 1}, r"held_snapshots_max: expected a whole number from 2 to 1000"),
    ({"held_snapshot_hours": 0}, r"held_snapshot_hours: expected a whole number from 1 to 8760"),
    ({"max_bandwidth_schedule": "* 08:00-18:00"}, r"max_bandwidth_schedule: .*is no rate"),
    ({"metrics_listen": "9849"}, r"metrics_listen: expected HOST:PORT, such as 127\.0\.0\.1:9849"),
    ({"metrics_listen": ":9849"}, r"metrics_listen: expected HOST:PORT"),
    ({"metrics_listen": "::1:9849"}, r"metrics_listen: expected HOST:PORT"),
    ({"metrics_listen": "localhost:65536"}, r"metrics_listen: expected HOST:PORT"),
    ({"metrics_listen": "a..b:9849"}, r"metrics_listen: expected a host name or an address$"),
    ({"dr_auth_token": None}, r"dr_auth_token: missing; make one with: openssl rand -hex 32"),
    ({"dr_auth_token": "ab" * 16}, r"dr_auth_token: .* 128 bits; at least 256"),
    ({"dr_auth_token": "xyz" * 30}, r"dr_auth_token: .*hex digits"),
    ({"dr_auth_token": "/nonexistent/key"}, r"dr_auth_token: /nonexistent/key: No such file"),
    ({"dr_host": None}, r" works where the VM is: .* names no receiver: dr_host"),
    ({"metrics_listen": "192.0.2.1:9849"}, r"metrics_listen: .* not an address of this host"),
    ({"max_bandwidth_schedule": "* 0; mon 5"}, r"max_bandwidth_schedule: 'mon 5' never holds: "),
    ({"dr_host": "a..b"}, r"dr_host: expected a host name or an address$"),
    ({"vm": "a/b"}, r"vm: a source pushes one VM, 'a/b' is not one plain name"),
    ({"vm": "*"}, r"vm: name the VM"),
    ({"vm": "web,db"}, r"vm: a source pushes one VM, 'web,db' is not one plain name"),
    ({"vm": "web-*"}, r"vm: a source pushes one VM"),
    ({"image_disks": None}, r"image_disks: name at least one disk"),
    (
        {"image_disks": "disk-0=/nonexistent/a.raw"},
        r"image_disks: disk-0: /nonexistent/a.raw: No such",
    ),
    ({"image_disks": "disk-0=/"}, r"image_disks: disk-0: / is neither a file nor a block device"),
    (
        {"source": "nutanix"},
        r"prism_central: missing; it names Prism Central \(source=nutanix\)$",
    ),
    ({"source": "qemu"}, r"qemu_socket: missing"),
    ({"source": "qemu", "qemu_socket": "/" + "long" * 30}, r"QMP socket"),
    (
        {"state_dir": "/nonexistent/a/b"},
        r"state_dir: /nonexistent/a/b cannot be made: /nonexistent/a is not",
    ),
    ({"state_dir": "/proc/replctl"}, r"state_dir: /proc/replctl is not writable|cannot be made"),
    ({"state_dir": "/dev/null"}, r"state_dir: /dev/null is not a directory"),
    (
        {"state_dir": "/dev/null/state"},
        r"state_dir: /dev/null/state cannot be made: /dev/null is not a directory",
    ),
    ({"working_dir": "/dev/null/work"}, r"working_dir: /dev/null/work cannot be made"),
]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("command", ["seed", "push", "run"])
@pytest.mark.parametrize(("values", "expected"), CASES, ids=lambda case: str(case)[:40])
def test_what_cannot_work_is_refused_before_anything_is_touched(
    tmp_path: Path, replctl: Replctl, values: Mapping[str, object], expected: str, command: str
) -> None:
    config = write_config(tmp_path / "replicator.conf", source_values(tmp_path, **values))
    before = tree(tmp_path)
    done = replctl("--config", config, command)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"replctl: [^\n]+\n", done.err), done.err
    assert re.search(expected, done.err, re.MULTILINE), done.err
    assert tree(tmp_path) == before
    token = values.get("dr_auth_token")
    assert token is None or "/" in str(token) or str(token) not in done.err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dr_listen": "192.0.2.1"}, "dr_listen: cannot listen on 192.0.2.1:{port}: not an addr"),
        ({"dr_listen": "hello"}, "dr_listen: cannot listen on hello:{port}: Name or service"),
        ({"metrics_listen": "nohost.invalid:9849"}, "metrics_listen: cannot listen on nohost.inv"),
        ({"metrics_listen": "192.0.2.1:9849"}, "metrics_listen: cannot listen on 192.0.2.1:9849"),
    ],
)
def test_a_receiver_that_cannot_listen_touches_nothing(
    tmp_path: Path,
    replctl: Replctl,
    monkeypatch: pytest.MonkeyPatch,
    values: Mapping[str, object],
    expected: str,
) -> None:
    look_up = socket.getaddrinfo

    def without_names(host: str | None, *rest: Any, **options: Any) -> Any:
        if host in ("hello", "nohost.invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", without_names)
    common = {"dr_auth_token": KEY, "dr_port": free_port(), "state_dir": tmp_path / "state"}
    config = write_config(tmp_path / "rx.conf", {**common, **values})
    done = replctl("--config", config, "receiver")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"replctl: [^\n]+\n", done.err), done.err
    assert done.err.startswith("replctl: " + expected.format(port=common["dr_port"]))
    assert not (tmp_path / "state").exists()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("key", ["dr_listen", "metrics_listen"])
def test_a_busy_port_is_no_fault_of_the_configuration_but_touches_nothing_either(
    tmp_path: Path, replctl: Replctl, key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        values: dict[str, object] = {"dr_auth_token": KEY, "state_dir": tmp_path / "state"}
        values |= (
            {"dr_listen": "127.0.0.1", "dr_port": port}
            if key == "dr_listen"
            else {"dr_listen": "127.0.0.1", "dr_port": free_port(), key: f"127.0.0.1:{port}"}
        )
        config = write_config(tmp_path / "rx.conf", values)
        done = replctl("--config", config, "receiver")
        assert (done.code, done.out) == (1, "")
        assert done.err == (
            f"replctl: {key}: cannot listen on 127.0.0.1:{port}: Address already in use\n"
        )
        assert not (tmp_path / "state").exists()
        # With the directory there, the other process may be the one that has it: that is said instead.
        with open_state_dir(tmp_path / "state"):
            done = replctl("--config", config, "receiver")
        assert done.code == 3
        assert "another replctl" in done.err


def test_every_key_that_one_side_only_reads_is_known_as_such() -> None:
    """The documents say which side a key is for; the same keys are warned of on the other."""
    text = (Path(__file__).parents[2] / "docs/configuration.md").read_text("utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\|[^|]*\| (source|receiver)\b[^|]*\|$", text, re.MULTILINE
    )
    both = {key for key, _ in rows if key in {"vm", "dr_host", "dr_allow"}}
    assert both == {"vm", "dr_host", "dr_allow"}  # the side's own mark, refused, and read by both
    for side, idle in (("source", NO_USE_ON_RECEIVER), ("receiver", NO_USE_ON_SOURCE)):
        assert {key for key, where in rows if where == side} - both == idle


def test_keys_of_the_other_side_are_warned_of_once_each(tmp_path: Path, replctl: Replctl) -> None:
    values = source_values(tmp_path, dr_restore_points=48, dr_listen="127.0.0.1", rpo_target=600)
    config = write_config(tmp_path / "source.conf", values)
    done = replctl("--config", config, "seed")  # which reaches nobody
    said = [line for line in done.err.splitlines() if "does nothing" in line]
    assert [line.partition(" WARNING ")[2] for line in said] == [
        "dr_restore_points does nothing on a source: it belongs in the receiver's configuration",
        "dr_listen does nothing on a source: it belongs in the receiver's configuration",
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        receiver: dict[str, object] = {
            "dr_auth_token": KEY,
            "state_dir": tmp_path / "dr",
            "max_bandwidth_mbps": 0,
            "rpo_target": 600,
            "dr_listen": "127.0.0.1",
            "dr_port": server.getsockname()[1],
        }
        config = write_config(tmp_path / "rx.conf", receiver)
        (tmp_path / "dr").mkdir()
        with open_state_dir(tmp_path / "dr"):
            done = replctl("--config", config, "receiver")  # ends at once: the directory is taken
    (line,) = [line for line in done.err.splitlines() if "does nothing" in line]
    assert line.endswith(
        "max_bandwidth_mbps does nothing on a receiver: it belongs in the source's configuration"
    )


def test_what_chooses_among_vms_is_warned_of_where_there_is_one(
    tmp_path: Path, replctl: Replctl
) -> None:
    values = source_values(tmp_path, exclude="db", cluster="a", concurrent_vms=4)
    done = replctl("--config", write_config(tmp_path / "source.conf", values), "seed")
    said = [line.partition(" WARNING ")[2] for line in done.err.splitlines()]
    assert [line for line in said if "does nothing" in line] == [
        f"{key} does nothing with source = image, which has one VM"
        for key in ("exclude", "cluster", "concurrent_vms")
    ]


def test_a_configuration_that_holds_the_key_must_be_private(
    tmp_path: Path, replctl: Replctl
) -> None:
    config = write_config(tmp_path / "replicator.conf", source_values(tmp_path), mode=0o640)
    done = replctl("--config", config, "seed")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"chmod 600 {config}" in done.err
    assert KEY not in done.err


def test_a_key_file_must_be_private(tmp_path: Path, replctl: Replctl) -> None:
    key = tmp_path / "web.key"
    key.write_text(KEY)
    key.chmod(0o644)
    config = write_config(tmp_path / "replicator.conf", source_values(tmp_path, dr_auth_token=key))
    done = replctl("--config", config, "seed")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"chmod 600 {key}" in done.err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dr_port 9\n", "line 1: expected key = value"),
        ("\ndr_port = 1\ndr-port = 2\n", "line 3: dr_port is given twice"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, replctl: Replctl, text: str, expected: str) -> None:
    config = tmp_path / "replicator.conf"
    config.write_text(text)
    done = replctl("--config", config, "status")
    assert (done.code, done.err) == (2, f"replctl: configuration {config}: {expected}\n")


def test_a_missing_file_is_named(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "none.conf"
    expected = f"replctl: configuration {path}: No such file or directory\n"
    assert replctl("--config", path, "status").err == expected
    monkeypatch.setenv("REPLCTL_CONFIG", str(path))
    assert replctl("status").err == expected


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "web"),
        ("export", "web", "--disk", "0", "--to", "/nonexistent/x"),
        ("failover", "test", "web"),
        ("failover", "undo", "web"),
    ],
)
def test_what_needs_the_recovery_points_is_refused_on_a_source(
    tmp_path: Path, replctl: Replctl, words: tuple[str, ...]
) -> None:
    config = write_config(
        tmp_path / "replicator.conf", source_values(tmp_path, dr_host="dr.example")
    )
    done = replctl("--config", config, *words)
    assert done.code == 2
    assert "run it on the receiver's host (dr.example)" in done.err


@pytest.mark.parametrize("command", ["seed", "push", "run"])
def test_a_state_directory_in_use_is_refused(
    tmp_path: Path, replctl: Replctl, command: str
) -> None:
    config = write_config(tmp_path / "replicator.conf", source_values(tmp_path))
    with open_state_dir(tmp_path / "state"):
        done = replctl("--config", config, command)
    assert done.code == 3
    assert re.fullmatch(r"replctl: another replctl \(pid \d+\) is using .*/state\n", done.err)
