# SPDX-License-Identifier: AGPL-3.0-or-later
"""A whole simulator, running as long as a block does: for tests, for the demonstration and for ``replctl simulate``."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import random
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from replicator import durable
from replicator.errors import RefusedError, StateError, UsageError
from replicator.nursery import flat_nursery
from replicator.simulator.certificates import Authority
from replicator.simulator.core import Core, load_world, open_core
from replicator.simulator.faults import Faults
from replicator.simulator.guest import Guest
from replicator.simulator.model import Cluster, User, Vm, World
from replicator.simulator.scenario import Scenario, Setup
from replicator.simulator.server import Server
from replicator.simulator.targets import FOLDER_PREFIX

PORT = 9440
ISCSI_PORT = 3260
#: Lines of account, space, password; and a file of ``password = …`` for each account. Private.
CREDENTIALS_FILE, PASSFILES = "credentials", "passfiles"
_LOCK_FILE, _NOTE_FILE = "lock", "targets"
_TRIES = 200


@dataclass(frozen=True, slots=True)
class Simulator:
    """A simulator that runs. ``address`` and ``port`` are Prism Central's; ``ca_path`` is the authority that clients trust."""

    core: Core
    server: Server
    directory: Path
    ca_path: Path

    @property
    def address(self) -> str:
        """Prism Central's address."""
        return self.core.world.address

    @property
    def port(self) -> int:
        """The port of Prism Central and of every Element."""
        return self.server.port

    @property
    def faults(self) -> Faults:
        """The faults in force."""
        return self.core.faults

    @property
    def world(self) -> World:
        """What the simulator holds."""
        return self.core.world

    def password(self, user: str) -> str:
        """An account's password. Raises KeyError."""
        return self.user(user).password

    def user(self, name: str) -> User:
        """An account by name. Raises KeyError."""
        for each in self.world.users.values():
            if each.name == name:
                return each
        raise KeyError(name)

    def cluster(self, name: str) -> Cluster:
        """A cluster by name. Raises KeyError."""
        for each in self.world.clusters.values():
            if each.name == name:
                return each
        raise KeyError(name)

    def vm(self, name: str) -> Vm:
        """The first VM of that name. Raises KeyError."""
        for each in self.world.vms.values():
            if each.name == name:
                return each
        raise KeyError(name)

    def guest(self, vm: str, index: int = 0) -> Guest:
        """A writer to a disk of a VM, given by id: its data disks are counted from 0."""
        return Guest(self.core, vm, index)


@asynccontextmanager
async def running_simulator(
    directory: Path,
    scenario: Scenario | None = None,
    *,
    base: str | None = None,
    port: int = PORT,
    iscsi_port: int = ISCSI_PORT,
    passwords: Mapping[str, str] | None = None,
) -> AsyncIterator[Simulator]:
    """Run a simulator whose state is kept in ``directory``; it listens when the block begins.

    A directory of an earlier run goes on with what it holds, addresses included; ``scenario`` then gives its knobs and faults
    alone. ``base``: the network of its addresses, as "127.9.8.0"; unless given, one that is free. ``passwords``: of accounts.
    Raises UsageError for a base that is none, RefusedError if another simulator has the directory, StateError if it cannot
    listen or if the state is damaged. The block's end, or cancellation, ends everything that was started, targets included.
    """
    chosen = scenario if scenario is not None else Scenario()
    await trio.to_thread.run_sync(_make_private, directory)
    with _locked(directory):
        earlier = await trio.to_thread.run_sync(_earlier, directory)
        setup: Setup | None = None
        if earlier is None:
            net = _free_net(port, iscsi_port) if base is None else _net(base)
            setup = Setup(chosen, net, dict(passwords or {}))
        elif base is not None and _net(base) != _prefix(earlier.address):
            raise UsageError(f"{directory} was made for {_prefix(earlier.address)}.0")
        make_world, prepare = _making(setup, directory)
        await trio.to_thread.run_sync(_remove_left, directory)
        authority = await trio.to_thread.run_sync(_authority, directory)
        async with open_core(directory, make_world, iscsi_port=iscsi_port, prepare=prepare) as core:
            core.knobs.update(chosen.knobs)
            core.faults.all += chosen.faults
            core.write_down()
            server = Server(core, authority, port)
            async with flat_nursery() as nursery:
                await _open_portals(core)
                if core.targets.folder is not None:
                    note = str(core.targets.folder).encode()
                    await trio.to_thread.run_sync(durable.write_file, directory / _NOTE_FILE, note)
                await nursery.start(server.serve)
                yield Simulator(core, server, directory, authority.path)
                nursery.cancel_scope.cancel()


async def _open_portals(core: Core) -> None:
    """A data services address, and each CVM, answers also while nothing is attached."""
    for cluster in core.world.clusters.values():
        for address in [*([cluster.data_services] if cluster.data_services else []), *cluster.cvms]:
            await core.targets.open_portal(address)


def _making(
    setup: Setup | None, directory: Path
) -> tuple[Callable[[], World], Callable[[Core], None]]:
    def make_world() -> World:
        assert setup is not None, "the state of an earlier run is there"
        return setup.world

    def prepare(core: Core) -> None:
        assert setup is not None, "the state of an earlier run is there"
        setup.fill(core.storage)
        lines = [f"{user.name} {user.password}\n" for user in setup.world.users.values()]
        durable.write_file(directory / CREDENTIALS_FILE, "".join(lines).encode())
        durable.make_dir(directory / PASSFILES)
        for user in setup.world.users.values():
            text = f"password = {user.password}\n"
            durable.write_file(directory / PASSFILES / user.name, text.encode())

    return make_world, prepare


def _make_private(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _earlier(directory: Path) -> World | None:
    try:
        return load_world(directory)
    except ValueError as error:
        raise StateError(str(error)) from error


def _authority(directory: Path) -> Authority:
    try:
        return Authority(directory)
    except ValueError as error:
        raise StateError(f"the authority in {directory} is damaged: {error}") from error


def _remove_left(directory: Path) -> None:
    """What a simulator that was killed left elsewhere: its targets have ended with it, their sockets have not."""
    note = directory / _NOTE_FILE
    if note.is_file():
        folder = Path(note.read_text())
        if folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith(FOLDER_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        note.unlink()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"another simulator runs in {directory}") from None
        yield
    finally:
        os.close(fd)


def _prefix(address: str) -> str:
    return address.rpartition(".")[0]


def _net(base: str) -> str:
    try:
        address = ipaddress.IPv4Address(base)
    except ValueError:
        raise UsageError(f"{base} is not an IPv4 address") from None
    if not address.is_loopback or int(address) & 255:
        raise UsageError(f"{base}: the base is an address 127.x.y.0")
    return _prefix(base)


def _free_net(*ports: int) -> str:
    """A network of loopback where nobody listens at the first Element's or Prism Central's address. Raises StateError."""
    source = random.SystemRandom()
    for _ in range(_TRIES):
        net = f"127.{source.randint(10, 250)}.{source.randint(0, 255)}"
        if all(_free(f"{net}.{last}", port) for last in (1, 20, 21) for port in ports):
            return net
    raise StateError("no free network of loopback was found: give --base")


def _free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


__all__ = ["CREDENTIALS_FILE", "ISCSI_PORT", "PORT", "Simulator", "running_simulator"]
