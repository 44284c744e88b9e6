# SPDX-License-Identifier: AGPL-3.0-or-later
"""The project's shape: who may import whom, licence lines, pinned packages, scripts that run."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import __version__

ROOT = Path(__file__).resolve().parent.parent

#: Lowest first: an import only ever points to the same part or to one further up in this table.
#: A dotted name is a part of its own inside the package; a new one needs a line here.
ORDER = (
    "eventstore",
    "replicator",  # the package's own __init__: the version
    "replicator.errors",
    "replicator.nursery",
    "replicator.memory",
    "replicator.timetable",
    "replicator.durable",
    "replicator.direct",
    "replicator.disk",
    "replicator.hardware",
    "replicator.phcbt",
    "replicator.imagemap",
    "replicator.domain",
    "replicator.log",
    "replicator.wire",
    "replicator.addresses",
    "replicator.config",
    "replicator.private_files",
    "replicator.credentials",
    "replicator.state_dir",
    "replicator.nbd",
    "replicator.prism",
    "replicator.prism_access",
    "replicator.iscsi",
    "replicator.health",
    "replicator.sources",
    "replicator.push",
    "replicator.control",
    "replicator.simulator",
    "replicator.cli",
    "receiver",
    "bacula_adapter",
)
PACKAGES = ("eventstore", "replicator", "receiver", "bacula_adapter")
FOLDERS = {*PACKAGES, ".ci", "bench", "docs", "scripts", "systemd", "tests"}
#: The domain is pure: what happens in it depends on its arguments alone.
IMPURE = {"eventstore", "lmdb", "os", "pathlib", "random", "shutil", "socket", "subprocess", "trio"}
SPDX = "SPDX-License-Identifier: AGPL-3.0-or-later"
WITH_SPDX = {".py", ".toml", ".txt", ".sh", ".service", ".c", ".h", ".conf", ".cfg"}


def project_files() -> list[str]:
    """Paths of all files that are committed, or would be by `git add`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    names = {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert "pyproject.toml" in names
    return sorted(names)


FILES = project_files()
MODULES = [name for name in FILES if name.endswith(".py") and name.split("/")[0] in PACKAGES]


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, also inside functions and for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def part_of(name: str) -> str | None:
    """The longest entry of ORDER that holds the dotted name; None outside the project."""
    fitting = [part for part in ORDER if name == part or name.startswith(part + ".")]
    return max(fitting, key=len, default=None)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def upward_imports(path: str, source: str) -> list[str]:
    """One line for each import of a module that points up."""
    own = part_of(module_name(path))
    assert own is not None
    rank = ORDER.index(own)
    found = []
    for line, name in imports_of(source):
        target = part_of(name)
        if name.split(".")[0] in {"tests", "bench", "scripts"}:
            found.append(f"{path}:{line}: {name} is no part of the product")
        elif target is not None and ORDER.index(target) > rank:
            found.append(f"{path}:{line}: {own} must not import {name}")
    return found


def test_imports_point_down() -> None:
    assert len(MODULES) > len(PACKAGES)
    found = [
        line for path in MODULES for line in upward_imports(path, (ROOT / path).read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("eventstore/journal.py", "from replicator import disk", 1),
        ("eventstore/journal.py", "import lmdb", 0),
        ("replicator/disk.py", "def f():\n    import replicator.phcbt.format", 1),
        ("replicator/disk.py", "from replicator.errors import UsageError", 0),
        ("replicator/domain/vm.py", "from replicator.wire import frames", 1),
        ("replicator/cli/main.py", "from receiver.command import receiver", 1),
        ("replicator/cli/main.py", "from replicator import __version__, push", 0),
        ("receiver/command.py", "import bacula_adapter.backend_command", 1),
        ("receiver/command.py", "from tests.lab import guest", 1),
        ("bacula_adapter/backend_command.py", "import receiver, replicator, eventstore", 0),
    ],
)
def test_the_rule_itself(path: str, source: str, expected: int) -> None:
    assert len(upward_imports(path, source)) == expected


def test_every_part_of_replicator_has_a_place_in_the_order() -> None:
    parts = {
        ".".join(module_name(path).split(".")[:2])
        for path in MODULES
        if path.startswith("replicator/")
    }
    assert parts - set(ORDER) == set()


def test_the_domain_is_pure() -> None:
    found = [
        f"{path}:{line}: {name}"
        for path in MODULES
        if path.startswith("replicator/domain/")
        for line, name in imports_of((ROOT / path).read_text("utf-8"))
        if name.split(".")[0] in IMPURE
    ]
    assert found == []


def test_every_imported_distribution_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {canonical(line) for line in project["dependencies"]}
    known = declared | set(PACKAGES) | set(sys.stdlib_module_names)
    undeclared = [
        f"{path}:{line}: {name}"
        for path in MODULES
        for line, name in imports_of((ROOT / path).read_text("utf-8"))
        if not known & {top := name.split(".")[0], canonical(top)}
    ]
    assert undeclared == []


def test_only_known_folders_stand_at_the_top() -> None:
    folders = {name.split("/")[0] for name in FILES if "/" in name}
    assert folders - FOLDERS == set()


def test_every_source_file_says_its_licence_first() -> None:
    def is_source(name: str) -> bool:
        return Path(name).suffix in WITH_SPDX or name in SHELL_SCRIPTS

    lacking = []
    for name in filter(is_source, FILES):
        lines = (ROOT / name).read_text("utf-8").splitlines()[:2]
        first = lines[1:] if lines and lines[0].startswith("#!") else lines
        if not first or SPDX not in first[0]:
            lacking.append(name)
    assert lacking == []


def canonical(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pins(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """What a requirements file installs: name to version and hashes."""
    found = {}
    text = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.match(
            r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)( ;[^#]*?)?((?: +--hash=\S+)+)$", line
        )
        assert match is not None, f"{name}: not a pin with hashes: {line[:60]}"
        hashes = frozenset(match[4].split())
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for value in hashes), line
        found[canonical(match[1])] = (match[2], hashes)
    return found


def test_pins_cover_what_is_declared_and_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    runtime, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    assert {canonical(line) for line in project["dependencies"]} <= runtime.keys()
    assert {canonical(line) for line in project["optional-dependencies"]["dev"]} <= dev.keys()
    assert {name: dev.get(name) for name in runtime} == runtime


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_pins_name_no_host_and_no_place(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert "://" not in text
    assert re.search(r"(?m)^\s*-", re.sub(r"(?m)^\s*--hash=", "", text)) is None


def shell_scripts() -> list[str]:
    """Files that bash runs: by their first line, or by their name."""
    found = []
    for name in FILES:
        with (ROOT / name).open("rb") as file:
            if file.readline(64).rstrip() == b"#!/usr/bin/env bash":
                found.append(name)
    return found


SHELL_SCRIPTS = shell_scripts()


def test_the_scripts_that_people_run_are_there() -> None:
    expected = {f"scripts/{name}" for name in ("setup", "test", "check", "bench", "demo")}
    assert {".ci/run", *expected} <= set(SHELL_SCRIPTS)


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", name], cwd=ROOT, check=True)
    subprocess.run(["shellcheck", name], cwd=ROOT, check=True)
    text = (ROOT / name).read_text("utf-8")
    assert "\nset -euo pipefail\n" in text
    assert os.access(ROOT / name, os.X_OK)


def test_the_wheel_holds_what_it_must_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy: building leaves folders behind."""
    copy = tmp_path / "project"
    for name in FILES:
        if name in {"pyproject.toml", "LICENSE"} or name.split("/")[0] in PACKAGES:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", tmp_path, copy], check=True, stdout=subprocess.PIPE, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("replctl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        commands = archive.read(entry_points).decode()
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in FILES if name in MODULES or name.endswith("/py.typed")
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "[replctl.commands]\nreceiver = receiver.command:receiver" in commands
    assert wheel.name.startswith(f"replctl-{__version__}-")


def test_a_skipped_test_fails_the_run(tmp_path: Path) -> None:
    test = tmp_path / "test_skipped.py"
    test.write_text("import pytest\n\n\ndef test_it():\n    pytest.skip('no such program')\n")
    # The same conftest, loaded by name, as the file stands outside the folder that it rules.
    options = ["-p", "tests.conftest", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", *options, test],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert "tests are never skipped" in done.stdout
    assert "no such program" in done.stdout
