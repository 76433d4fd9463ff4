"""Which machines and processes take part in this command, by its options or by the launcher that started it?

`torchrun` and DeepSpeed's launcher set RANK, WORLD_SIZE and MASTER_ADDR themselves. Slurm's ``srun`` sets variables of its own, which
are read here. With ``--nodes`` the user starts the same command on every machine and nothing else is needed.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mllm.errors import ConfigError

PORT = 29500


@dataclass(frozen=True)
class Machines:
    """Several machines on which the same command is started, ``processes`` on each; they meet at ``host:port``, where the first
    one listens."""

    nodes: int
    node_rank: int
    host: str
    port: int
    processes: int


def placed() -> bool:
    """Whether a launcher (torchrun, DeepSpeed's, or `adopt_slurm`) has given this process its place in a run."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def find_machines(
    *,
    nodes: int | None = None,
    node_rank: int | None = None,
    rendezvous: str | None = None,
    hostfile: str | Path | None = None,
    processes: int = 1,
) -> Machines | None:
    """What the options say, filled up from the hostfile and from Slurm's variables; None for one machine.

    Under ``srun`` with one task a process this process takes its place (`adopt_slurm`); with one task a machine and ``processes``
    greater than 1 the tasks are the machines. Raises `ConfigError`.
    """
    if placed():
        if nodes is not None or hostfile is not None:
            raise ConfigError(
                "--nodes and --hostfile: another launcher (torchrun, deepspeed) has already given this process its place; "
                "leave them out, or start mllm without it"
            )
        return None
    step = slurm_step(os.environ)
    if step is not None and nodes is None and hostfile is None:
        if processes == 1:
            adopt_slurm(step)
            return None
        if step.tasks != step.nodes:
            raise ConfigError(
                f"--processes {processes}: srun started {step.tasks} tasks on {step.nodes} machine(s), and each would start "
                "so many again; leave --processes out, or give srun --ntasks-per-node=1"
            )
        nodes = step.tasks
    hosts: list[tuple[str, int]] = []
    if hostfile is not None:
        hosts = read_hostfile(Path(hostfile))
        nodes = nodes or len(hosts)
        if processes == 1:
            processes = hosts[0][1]
            if {slots for _, slots in hosts[:nodes]} != {processes}:
                raise ConfigError(
                    f"{hostfile}: machines have unlike numbers of slots ({', '.join(f'{h} {s}' for h, s in hosts)}); every "
                    "machine starts the same number of processes: --processes N"
                )
    if nodes is None:
        if node_rank is not None or rendezvous is not None:
            raise ConfigError("--node-rank and --rendezvous are for several machines; give their number too: --nodes N")
        return None
    if nodes < 1:
        raise ConfigError(f"--nodes is {nodes}; 1 or more is expected")
    if nodes == 1 and hostfile is None:
        return None
    host, port = _address(rendezvous, hosts[0][0] if hosts else step.first_host if step is not None else None)
    if node_rank is None:
        node_rank = step.node if step is not None else _own_place([name for name, _ in hosts])
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"--node-rank is {node_rank}; of {nodes} machines it is 0 to {nodes - 1}")
    return Machines(nodes, node_rank, host, port, processes)


def _address(rendezvous: str | None, default: str | None) -> tuple[str, int]:
    if rendezvous is None:
        if default is None:
            raise ConfigError(
                "--nodes: where do they meet? The first machine's name or address: --rendezvous HOST:29500"
            )
        return default, PORT
    host, colon, text = rendezvous.rpartition(":")
    if not colon:
        return rendezvous, PORT
    if not host or not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"--rendezvous is {rendezvous!r}; expected the first machine and a port, as node0:29500")
    return host.strip("[]"), int(text)


def _own_place(hosts: list[str]) -> int:
    own = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    found = [place for place, name in enumerate(hosts) if name in own or name.partition(".")[0] in own]
    if len(found) != 1:
        raise ConfigError(
            "--node-rank: which machine is this? 0 on the one that --rendezvous names, then 1, 2 …"
            + (f" (this one is called {socket.gethostname()}, the hostfile has {', '.join(hosts)})" if hosts else "")
        )
    return found[0]


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """(host, slots) for each line ``host slots=8`` of a DeepSpeed hostfile. Raises `ConfigError` naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({error})") from None
    hosts: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise ConfigError(f"--hostfile {path}:{number}: {text!r}; expected a line such as 'node0 slots=8'")
        if match[1] in [name for name, _ in hosts]:
            raise ConfigError(f"--hostfile {path}:{number}: {match[1]} is named twice")
        hosts.append((match[1], int(match[2])))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no machine")
    return hosts


@dataclass(frozen=True)
class SlurmStep:
    """A step that ``srun`` started, seen from one of its tasks."""

    tasks: int
    task: int
    local_task: int
    nodes: int
    node: int
    tasks_here: int
    first_host: str
    port: int


def slurm_step(environ: Mapping[str, str]) -> SlurmStep | None:
    """The step this process is a task of; None outside ``srun`` (also in a batch script itself) or with a single task."""
    try:
        tasks = int(environ["SLURM_STEP_NUM_TASKS"])
        if tasks < 2:
            return None
        node = int(environ["SLURM_NODEID"])
        each = _counts(environ["SLURM_STEP_TASKS_PER_NODE"])
        return SlurmStep(
            tasks=tasks,
            task=int(environ["SLURM_PROCID"]),
            local_task=int(environ["SLURM_LOCALID"]),
            nodes=len(each),
            node=node,
            tasks_here=each[node],
            first_host=host_names(environ["SLURM_STEP_NODELIST"])[0],
            port=20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000,
        )
    except KeyError:
        return None


def adopt_slurm(step: SlurmStep) -> None:
    """Take this process's place in the step, as torchrun would have set it. MASTER_ADDR and MASTER_PORT that are set stay."""
    os.environ.update(
        RANK=str(step.task),
        WORLD_SIZE=str(step.tasks),
        LOCAL_RANK=str(step.local_task),
        LOCAL_WORLD_SIZE=str(step.tasks_here),
        GROUP_RANK=str(step.node),
    )
    os.environ.setdefault("MASTER_ADDR", step.first_host)
    os.environ.setdefault("MASTER_PORT", str(step.port))


def _counts(text: str) -> list[int]:
    """``4(x2),3`` → [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def host_names(text: str) -> list[str]:
    """The names in a Slurm list of hosts: ``gpu[01-02,7],login`` → gpu01, gpu02, gpu7, login."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            choices = [literal] if literal else [name for item in ranges.split(",") for name in _numbers(item)]
            expanded = [before + choice for before in expanded for choice in choices]
        names += expanded
    return names


def _numbers(item: str) -> list[str]:
    low, _, high = item.partition("-")
    return [f"{value:0{len(low)}d}" for value in range(int(low), int(high or low) + 1)]
