"""Where the processes of a side meet: on loopback, or with a round trip in between.

Then each has a network namespace of its own, and a relay carries the packets between them, held for half the round trip. The
kernel's netem would do so too, but is left out of many kernels of virtual machines.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_SEATS = 3
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001  # linux/if_tun.h
_DEVICE = "wire"


class NoLatency(Exception):
    """Why it cannot be emulated here."""


@dataclass(frozen=True)
class Link:
    hosts: tuple[str, ...]
    prefixes: tuple[tuple[str, ...], ...]
    """What starts a process in its place."""
    device: str | None


LOOPBACK = Link(("127.0.0.1",) * _SEATS, ((),) * _SEATS, None)


@contextmanager
def delayed(*, round_trip_s: float) -> Iterator[Link]:
    """Takes root, iproute2 and /dev/net/tun; raises NoLatency without."""
    with ExitStack() as stack:
        names = [f"mpc-{os.getpid()}-{seat}" for seat in range(_SEATS)]
        try:
            devices = [_seat(stack, name, f"10.77.0.{seat + 1}") for seat, name in enumerate(names)]
        except (OSError, subprocess.CalledProcessError) as exc:
            said = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else exc
            raise NoLatency(f"no network namespaces with a tun device here: {str(said).strip()}") from exc
        ended = threading.Event()
        relay = threading.Thread(target=_relay, args=(devices, round_trip_s / 2, ended))
        relay.start()
        stack.callback(relay.join)
        stack.callback(ended.set)
        hosts = tuple(f"10.77.0.{seat + 1}" for seat in range(_SEATS))
        yield Link(hosts, tuple(("ip", "netns", "exec", name) for name in names), _DEVICE)


def _seat(stack: ExitStack, name: str, host: str) -> int:
    """A namespace of that name whose one device's packets are read and written here."""
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, device)
    made = fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"mpc%d", _TUN_WITHOUT_HEADER))
    _ip("link", "set", made[:16].rstrip(b"\0").decode(), "netns", name, "name", _DEVICE)
    _ip("-n", name, "address", "add", f"{host}/24", "dev", _DEVICE)
    _ip("-n", name, "link", "set", _DEVICE, "up", "mtu", "65535", "txqueuelen", "10000")
    _ip("-n", name, "link", "set", "lo", "up")
    return device


def _relay(devices: list[int], one_way_s: float, ended: threading.Event) -> None:
    waiting: deque[tuple[float, bytes]] = deque()  # all are held for as long, so that they are due in order
    while not ended.is_set():
        patience = waiting[0][0] - time.monotonic() if waiting else 0.1
        readable, _, _ = select.select(devices, [], [], max(patience, 0))
        for device in readable:
            packet = os.read(device, 65536)
            if packet[0] >> 4 == 4:
                waiting.append((time.monotonic() + one_way_s, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            packet = waiting.popleft()[1]
            seat = packet[19] - 1  # the last byte of the IPv4 destination
            if seat < len(devices):
                os.write(devices[seat], packet)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
