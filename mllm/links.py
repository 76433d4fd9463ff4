"""Through which of this machine's networks do the processes of a run reach each other?

Gloo takes the network that the machine's own name stands for. Debian and many containers give that name an address that the machine alone
knows (127.0.1.1), and the other machines' processes then call in vain. The network that leads to the meeting place is one that they see.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "GLOO_SOCKET_IFNAME"


@contextmanager
def through_meeting_place(host: str, port: int, store: Any, *, process: int, processes: int) -> Iterator[None]:
    """For the block, gloo uses the network that leads to ``host``; what the user or a launcher has set stays.

    store: torch's, shared by all ``processes``. The machine that is ``host`` may know itself by such an address too: it then takes the
    network that leads to the last process.
    """
    address = own_address(host, port)
    if process == processes - 1:
        store.set("address_of_last", address)
    if VARIABLE in os.environ:
        yield
        return
    if process < processes - 1 and _within(address) and not _within(last := store.get("address_of_last").decode()):
        address = own_address(last, port) if last else ""
    name = interface_of(address)
    if name:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if name:
            os.environ.pop(VARIABLE, None)


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to ``host``; empty where there is none. Nothing is sent."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            return probe.getsockname()[0]
    except OSError:
        return ""


def interface_of(address: str) -> str:
    """The name of the network port that has ``address``, as ``ip addr`` shows it; empty where none has."""
    try:
        import psutil
    except ImportError:  # comes with accelerate; without it gloo chooses by itself
        return ""
    for name, entries in psutil.net_if_addrs().items():
        if address and any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in entries):
            return name
    return ""


def _within(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
