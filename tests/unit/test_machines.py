"""Does a command know its place among machines, whoever starts it?"""

from __future__ import annotations

import os

import pytest

from mllm.errors import ConfigError
from mllm.machines import Machines, adopt_slurm, find_machines, host_names, read_hostfile, slurm_step

STEP = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08],big3",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken away after it
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def test_options_say_which_machine_this_is():
    assert find_machines(processes=8) is None and find_machines(nodes=1) is None
    found = find_machines(nodes=4, node_rank=2, rendezvous="node0:1234", processes=8)
    assert found == Machines(4, 2, "node0", 1234, 8)
    assert find_machines(nodes=2, node_rank=0, rendezvous="[fe80::1]:7").host == "fe80::1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "--nodes is 0; 1 or more"),
        ({"nodes": 2, "node_rank": 0}, "--rendezvous HOST:29500"),
        ({"nodes": 2, "rendezvous": "a:1"}, "--node-rank: which machine is this"),
        ({"nodes": 2, "node_rank": 2, "rendezvous": "a:1"}, "--node-rank is 2; of 2 machines it is 0 to 1"),
        ({"nodes": 2, "node_rank": 0, "rendezvous": "a:b"}, "expected the first machine and a port"),
        ({"node_rank": 1}, "give their number too: --nodes N"),
    ],
)
def test_half_a_place_is_refused_with_what_to_type(options, message):
    with pytest.raises(ConfigError, match=message):
        find_machines(**options)


def test_torchrun_has_the_word(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_machines(processes=1) is None
    with pytest.raises(ConfigError, match="another launcher"):
        find_machines(nodes=2, node_rank=1, rendezvous="a:1")


def test_lists_of_hosts_are_read_as_slurm_writes_them():
    assert host_names("gpu[01-03,7],login,a[1-2]b[8-9]") == [
        "gpu01", "gpu02", "gpu03", "gpu7", "login", "a1b8", "a1b9", "a2b8", "a2b9",
    ]  # fmt: skip


def test_a_task_of_srun_takes_its_place(monkeypatch):
    step = slurm_step(STEP)
    assert (step.tasks, step.nodes, step.tasks_here, step.first_host, step.port) == (5, 3, 2, "gpu07", 23456)
    assert slurm_step({}) is None and slurm_step(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    adopt_slurm(step)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "5", "1", "2", "gpu07", "23456"]


def test_one_task_a_machine_starts_its_own_processes(monkeypatch):
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert find_machines(processes=8) == Machines(2, 1, "gpu07", 29500, 8)
    assert "RANK" not in os.environ
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    with pytest.raises(ConfigError, match="srun started 4 tasks on 2 machine"):
        find_machines(processes=8)


def test_a_hostfile_gives_machines_slots_and_this_ones_place(tmp_path, monkeypatch):
    file = tmp_path / "hosts"
    file.write_text("# two\nnode0 slots=4\nnode1 slots=4  # here\n")
    monkeypatch.setattr("socket.gethostname", lambda: "node1.cluster")
    assert find_machines(hostfile=file) == Machines(2, 1, "node0", 29500, 4)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(ConfigError, match="this one is called elsewhere, the hostfile has node0, node1"):
        find_machines(hostfile=file)
    wrong = {"node0\n": "hosts:1: 'node0'; expected", "a slots=1\na slots=2": "named twice", "#": "names no machine"}
    for text, message in wrong.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_hostfile(file)
    file.write_text("a slots=1\nb slots=2\n")
    with pytest.raises(ConfigError, match=r"unlike numbers of slots \(a 1, b 2\)"):
        find_machines(hostfile=file)
