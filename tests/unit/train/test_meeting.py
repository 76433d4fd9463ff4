"""Do machines that were started unlike, or cannot meet, hear it in one line?"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mllm.errors import ConfigError, GpuFull
from mllm.machines import Machines
from mllm.train import agreement, gpu_memory, launch
from mllm.train.meeting import MachineLost, meeting
from tests.helpers import free_port


def _together(*all_machines, inside=lambda met: None):
    """What each machine's meeting ended with."""
    ended = [None] * len(all_machines)

    def one(place, machines):
        try:
            with meeting(machines) as met:
                inside(met)
        except Exception as error:
            ended[place] = error

    threads = [threading.Thread(target=one, args=item) for item in enumerate(all_machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_machines_started_unlike_are_told_apart():
    port = free_port()
    ended = _together(Machines(2, 0, "127.0.0.1", port, 4), Machines(2, 1, "127.0.0.1", port, 2))
    assert all(isinstance(error, ConfigError) for error in ended), ended
    assert "--processes is 2 on machine 1" in str(ended[1]) and str(ended[0]) == str(ended[1])


def test_a_machine_that_ends_is_heard_by_the_other(monkeypatch):
    monkeypatch.setattr("mllm.train.meeting.BEAT_SECONDS", 0.05)

    def inside(met):
        if met.machines.node_rank == 1:
            raise ConfigError("a shard is missing")
        while met.news() is None:
            pass
        raise MachineLost(met.news())

    port = free_port()
    here, _ = _together(*(Machines(2, rank, "127.0.0.1", port, 1) for rank in range(2)), inside=inside)
    assert isinstance(here, MachineLost)
    assert str(here).startswith("machine 1 (") and "ended the run: a shard is missing" in str(here)


def test_a_port_in_use_is_named_with_another():
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("0.0.0.0", port))
        taken.listen()
        here = Machines(2, 0, "127.0.0.1", port, 1)
        with pytest.raises(ConfigError, match=f"port {port} of this machine is in use"), meeting(here):
            pass


def test_what_differs_is_said_with_machine_and_cure():
    same = {"commit": "abc", "recipe": '{"stages": {"sft": {"lr": 1}}}', "versions": '{"torch": "2.11"}'}
    same["data"] = '{"sft": {"a": "x"}}'
    cases = {
        "commit": ("def", "B runs the code of def, A that of abc. Bring both to one commit"),
        "versions": ('{"torch": "2.12"}', "torch: '2.11' on A, '2.12' on B"),
        "recipe": ('{"stages": {"sft": {"lr": 2}}}', "stages.sft.lr: 1 on A, 2 on B"),
        "data": ('{"sft": {"a": "y"}}', "sft.a: 'x' on A, 'y' on B"),
    }
    assert agreement.unlike([("A", same), ("B", dict(same))]) is None
    for key, (value, message) in cases.items():
        assert message in agreement.unlike([("A", same), ("C", dict(same)), ("B", same | {key: value})])


def test_a_folder_that_some_machines_share_names_the_one_that_has_its_own():
    names = ["machine 0 (a)", "machine 1 (b)", "machine 2 (c)"]
    told = agreement.shared_by_some({0: {0, 1}, 1: {0, 1}, 2: {2}}, names)
    assert told is not None
    assert told.startswith(
        "machine 2 (c) does not see what machine 0 (a) writes there, while machine 0 (a) and machine 1 (b) share it"
    )
    told = agreement.shared_by_some({0: {0}, 1: {1, 2}, 2: {1, 2}}, names)
    assert told is not None and told.startswith("machine 0 (a) does not see what machine 1 (b) writes")
    assert agreement.shared_by_some({0: {0}, 1: {1}, 2: {2}}, names) is None
    assert agreement.shared_by_some({number: {0, 1, 2} for number in range(3)}, names) is None
    assert not agreement._is_disk(Path("/proc")), "a file there may come late, for all that is known"


def test_a_gpu_that_others_fill_is_told(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (140e9, 141e9))
    gpu_memory.tell_busy_gpu()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (70e9, 141e9))
    gpu_memory.tell_busy_gpu()
    assert "! GPU 1 of " in (told := capsys.readouterr().err) and "hold 71 of 141 GB" in told


@pytest.mark.parametrize(("free", "cure"), [(1e9, "max_tokens_per_batch"), (0.0, "nvidia-smi")])
def test_a_full_gpu_is_one_line_that_says_who_holds_it(monkeypatch, free, cure):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 141e9))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 139e9 if free else 70e9)
    for raised in (torch.OutOfMemoryError("Tried to allocate"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(GpuFull) as error, gpu_memory.naming_a_full_gpu():
            raise raised
        assert cure in str(error.value) and "--resume" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="shape"), gpu_memory.naming_a_full_gpu():
        raise RuntimeError("shape mismatch")
    assert gpu_memory.usable_memory() == (141e9 if free else 70e9), "what engine: auto plans with"


def test_a_run_that_tells_of_a_full_gpu_ends_whoever_its_exit_would_wait_for():
    code = """
import threading, time
from mllm.cli import main as cli
from mllm.errors import GpuFull

threading.Thread(target=time.sleep, args=(60,)).start()  # stands for what holds the GPU

def app():
    raise GpuFull("GPU 0 is full")

cli.app = app
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: GPU 0 is full\n")


@pytest.mark.parametrize(("text", "lost"), [("gloo: Connection closed by peer [10.0.0.2]:41", True), ("a bug", False)])
def test_another_launchers_process_says_in_a_line_that_a_neighbour_is_gone(text, lost):
    with pytest.raises(RuntimeError) as raised, launch._naming_lost_machines():
        raise RuntimeError(text)
    assert ("another process of this run is gone" in str(raised.value)) == lost
    assert isinstance(raised.value, MachineLost) == lost
