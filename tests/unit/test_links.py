"""Do processes of several machines meet in a network that all of them see?"""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from mllm import distributed
from mllm.errors import ConfigError
from mllm.links import VARIABLE, interface_of, through_meeting_place


class _Store(dict[str, bytes]):
    """torch's store, of one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]


def _network(store: _Store, **place: int) -> str | None:
    with through_meeting_place("127.0.0.1", 29500, store, **place):
        return os.environ.get(VARIABLE)


@pytest.fixture
def outside() -> tuple[str, str]:
    """A port of this machine that leads outside, and its address."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return name, entry.address
    pytest.skip("this machine has no network but its own")


def test_a_machine_that_knows_itself_by_its_inner_address_takes_the_network_of_the_others(monkeypatch, outside):
    """As Debian's 127.0.1.1: the others cannot call there."""
    monkeypatch.delenv(VARIABLE, raising=False)
    name, address = outside
    inner = interface_of("127.0.0.1")
    assert inner and interface_of(address) == name and interface_of("") == interface_of("203.0.113.1") == ""
    store = _Store()
    assert _network(store, process=1, processes=2) == inner and store["address_of_last"] == b"127.0.0.1"
    assert _network(store, process=0, processes=2) == inner, "all on one machine"
    store["address_of_last"] = address.encode()
    assert _network(store, process=0, processes=2) == name
    assert VARIABLE not in os.environ


def test_what_the_user_has_set_stays_and_the_others_do_not_wait(monkeypatch):
    monkeypatch.setenv(VARIABLE, "ib0")
    store = _Store()
    assert _network(store, process=1, processes=2) == "ib0" and "address_of_last" in store
    assert os.environ[VARIABLE] == "ib0"


def test_processes_that_do_not_come_through_hear_it_in_one_line(monkeypatch):
    def fail(**_):
        raise RuntimeError(
            "Gloo connectFullMesh failed with [/src/pair.cc:152] timed out connecting, remote=[127.0.0.1]:4\nmore"
        )

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(ConfigError) as error, distributed.process_group(always=True):
        pass
    told = str(error.value)
    assert "process 0 of 1 on " in told and "with timed out connecting, remote=[127.0.0.1]:4" in told
    assert f"{VARIABLE}=…" in told and "\n" not in told
