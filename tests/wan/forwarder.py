# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m tests.wan.forwarder OPTIONS`: two network namespaces and the long, narrow, lossy line between them, in one process.

The kernel of a test machine often has no netem, so the line is here: a TUN device in each namespace, and packets carried
between the two with a rate, a delay, a queue that drops its tail, and loss. Real TCP runs over it, and retransmits.

The namespaces have no names and the devices no permanence: the kernel takes both back when this process and those that it was
asked to hold have ended. It ends with its standard input, and kills then what still runs in its namespaces; so nothing is left
when whoever started it is killed. ``lab.py`` speaks to it: a JSON object a line, each way.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

SOURCE, RECEIVER = 0, 1
ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")
MTU: Final = 1500
#: A packet with so much TCP payload carries a disk's data: requests and answers of the protocol are shorter.
DATA_PACKET: Final = 1000
SYN: Final = b"SYN"

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_TCP, _SYN, _RST, _ACK = 6, 0x02, 0x04, 0x10
_UNREAD_MAX = (
    5000  # packets that wait for this process when it is late; the line's own queue is in ``Way``
)
_READS = 64  # packets taken from one side before the other has its turn


class Namespace:
    """A network namespace with a TUN device in it. ``fd`` keeps the namespace, ``tun`` the device."""

    def __init__(self, number: int, congestion: str) -> None:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.unshare(_CLONE_NEWNET), "making a network namespace")
            try:
                self.fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                self.tun = _open_tun()
                own, other = ADDRESSES[number], ADDRESSES[1 - number]
                for command in (
                    "link set lo up",
                    f"address add {own} peer {other} dev wan0",
                    f"link set wan0 mtu {MTU} txqueuelen {_UNREAD_MAX} up",
                    # The default may not be changed inside a namespace; a route's algorithm may be.
                    f"route replace {other} dev wan0 congctl {congestion}",
                ):
                    _ip(command)
            finally:
                _check(_libc.setns(home, _CLONE_NEWNET), "coming back from a namespace")
        finally:
            os.close(home)

    def pids(self) -> list[int]:
        """The processes in it."""
        own, found = os.fstat(self.fd), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    there = (entry / "ns/net").stat()
                except OSError:
                    continue  # it has just ended
                if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                    found.append(int(entry.name))
        return found


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(0, f"ip {command}: {' '.join(done.stderr.split())}")


def _open_tun() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", b"wan0", _IFF_TUN_NO_PI))
    return fd


class Way:
    """One direction of the line: a link that sends one packet after the other, then a delay."""

    def __init__(self, options: argparse.Namespace, dice: random.Random) -> None:
        self._bytes_per_s = options.mbit * 1e6 / 8
        self._delay_s = options.delay_ms / 1000
        self._queue_bytes = options.queue_kib * 1024
        self._loss = options.loss
        self._dice = dice
        self._free_at = 0.0
        self._under_way: deque[tuple[float, bytes]] = deque()
        self.carried_bytes = 0
        self.carried_packets = 0
        self.lost = 0
        self.overflowed = 0

    def put(self, packet: bytes, now: float) -> None:
        """A packet enters, or is dropped."""
        if self._dice.random() < self._loss:
            self.lost += 1
            return
        start = max(self._free_at, now)
        if (start - now) * self._bytes_per_s > self._queue_bytes:
            self.overflowed += 1
            return
        self._free_at = start + len(packet) / self._bytes_per_s
        self._under_way.append((self._free_at + self._delay_s, packet))

    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else None

    def take(self, now: float) -> bytes | None:
        """The next packet that has arrived."""
        if not self._under_way or self._under_way[0][0] > now:
            return None
        packet = self._under_way.popleft()[1]
        self.carried_bytes += len(packet)
        self.carried_packets += 1
        return packet

    def lose_all(self) -> None:
        """What is under way is gone."""
        self._under_way.clear()
        self._free_at = 0.0


class Forwarder:
    """The line. ``reset``: while it is cut, each packet is answered with a TCP reset, as a firewall's, instead of nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        dice = random.Random(options.seed)
        self.spaces = [Namespace(number, options.congestion) for number in (SOURCE, RECEIVER)]
        self._ways = [Way(options, dice) for _ in self.spaces]
        self._cut = False
        self._reset = False
        self._cut_after: int | None = None
        self._heal_after: int | None = None
        self._attempts = 0
        self._tried: set[bytes] = set()
        self._cuts = 0
        self._healed_at: float | None = None
        #: For each end of a cut: seconds until the first packet of data arrived at the receiver.
        self._pauses: list[float] = []

    def run(self) -> None:
        """Until standard input ends."""
        say({"pid": os.getpid(), "namespaces": [space.fd for space in self.spaces]})
        tuns, commands = [space.tun for space in self.spaces], b""
        os.set_blocking(0, False)
        while True:
            ready, _, _ = select.select([*tuns, 0], [], [], self._patience())
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, commands = (commands + data).split(b"\n")
                for line in lines:
                    say(self._obey(json.loads(line)))
            for number, tun in enumerate(tuns):
                if tun in ready:
                    self._read(number, tun)
            self._deliver(tuns)

    def end(self) -> None:
        """Kill what still runs in the namespaces: nothing of it can reach anybody any more."""
        for space in self.spaces:
            for pid in space.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _patience(self) -> float | None:
        times = [due for way in self._ways if (due := way.due()) is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _read(self, number: int, tun: int) -> None:
        for _ in range(_READS):
            try:
                packet = os.read(tun, 65536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue  # IPv6 looking for its neighbours
            if self._cut:
                self._drop(number, packet, tun)
            else:
                self._ways[number].put(packet, time.monotonic())

    def _drop(self, number: int, packet: bytes, tun: int) -> None:
        if self._reset and (answer := reset_of(packet)) is not None:
            os.write(tun, answer)
        if number == SOURCE and (place := place_of(packet)) is not None:
            self._attempts += place in self._tried
            self._tried.add(place)
            if self._heal_after is not None and self._attempts >= self._heal_after:
                self._heal()

    def _deliver(self, tuns: list[int]) -> None:
        now = time.monotonic()
        for number, way in enumerate(self._ways):
            while (packet := way.take(now)) is not None:
                os.write(tuns[1 - number], packet)
                if number == SOURCE:
                    self._arrived(packet, now)

    def _arrived(self, packet: bytes, now: float) -> None:
        if self._healed_at is not None and payload_bytes(packet) >= DATA_PACKET:
            self._pauses.append(now - self._healed_at)
            self._healed_at = None
        if self._cut_after is not None and self._ways[SOURCE].carried_bytes >= self._cut_after:
            self._cut_after = None
            self._cut_now()

    def _cut_now(self) -> None:
        self._cut, self._attempts, self._healed_at = True, 0, None
        self._tried = {SYN}
        self._cuts += 1
        for way in self._ways:
            way.lose_all()

    def _heal(self) -> None:
        self._cut, self._heal_after = False, None
        self._healed_at = time.monotonic()

    def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "cut":
                self._reset = command["reset"]
                self._heal_after = command["heal_after"]
                if command["after"] is None:
                    self._cut_now()
                else:
                    self._cut_after = self._ways[SOURCE].carried_bytes + command["after"]
            case "heal":
                self._heal()
            case "state":
                pass
            case other:
                raise ValueError(f"no command {other!r}")
        return {
            "number": command["number"],
            "cut": self._cut,
            "cuts": self._cuts,
            "pauses": self._pauses,
            "carried": [way.carried_bytes for way in self._ways],
            "packets": [way.carried_packets for way in self._ways],
            "lost": [way.lost for way in self._ways],
            "overflowed": [way.overflowed for way in self._ways],
        }


def payload_bytes(packet: bytes) -> int:
    """Bytes of TCP payload in an IPv4 packet; 0 for anything else."""
    head = (packet[0] & 15) * 4
    if packet[9] != _TCP or len(packet) < head + 20:
        return 0
    return len(packet) - head - (packet[head + 12] >> 4) * 4


def place_of(packet: bytes) -> bytes | None:
    """What two packets of TCP have in common if one repeats the other; ``SYN`` for each that begins a connection."""
    head = (packet[0] & 15) * 4
    if packet[9] != _TCP or len(packet) < head + 20:
        return None
    if packet[head + 13] & _SYN:
        return SYN
    return packet[head : head + 8] if payload_bytes(packet) else None


def reset_of(packet: bytes) -> bytes | None:
    """The reset that a firewall would answer a TCP packet with; None for what is answered with nothing."""
    head = (packet[0] & 15) * 4
    if packet[9] != _TCP or len(packet) < head + 20 or packet[head + 13] & _RST:
        return None
    ports, flags = packet[head : head + 4], packet[head + 13]
    sequence, acknowledged = struct.unpack_from(">II", packet, head + 4)
    if flags & _ACK:
        numbers, answer_flags = struct.pack(">II", acknowledged, 0), _RST
    else:  # a connection that begins: the reset acknowledges its SYN
        numbers, answer_flags = struct.pack(">II", 0, (sequence + 1) & 0xFFFFFFFF), _RST | _ACK
    tcp = bytearray(ports[2:] + ports[:2] + numbers + bytes([0x50, answer_flags]) + bytes(6))
    source, target = packet[16:20], packet[12:16]
    struct.pack_into(">H", tcp, 16, _checksum(source + target + b"\0\x06\0\x14" + tcp))
    ip = bytearray(struct.pack(">BBHIBBH", 0x45, 0, 40, 0, 64, _TCP, 0) + source + target)
    struct.pack_into(">H", ip, 10, _checksum(ip))
    return bytes(ip + tcp)


def _checksum(data: bytes | bytearray) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def say(value: object) -> None:
    """One line to whoever started this."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Make the namespaces and carry packets until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="one way")
    parser.add_argument("--loss", type=float, default=0.001, help="of packets, 0 to 1")
    parser.add_argument("--queue-kib", type=float, default=512.0)
    parser.add_argument("--congestion", default="cubic")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        forwarder = Forwarder(options)
    except OSError as error:
        what = error.strerror or str(error)
        say({"error": f"{error.filename}: {what}" if error.filename else what})
        return 1
    with suppress(PermissionError):
        os.nice(-20)  # a line does not get slower because the machine is busy
    try:
        forwarder.run()
    finally:
        forwarder.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
