"""How fast do the processes of a run exchange gradients, and how fast should they?

All-reduces as the engines make them, for some seconds, between all processes and between each two machines. The expectation is
the fastest link that the system names (InfiniBand first, Ethernet otherwise), of which good clusters reach nine tenths.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mllm import distributed
from mllm.errors import ConfigError
from mllm.machines import Machines, placed
from mllm.train.launch import launch
from mllm.train.meeting import meeting

_REACHED = 0.9
"""Share of a link's rate that an all-reduce over a well set up cluster reaches (NCCL's own tests: 46 to 48 of 50 GB/s)."""
_BYTES = {"cuda": 512 << 20, "cpu": 16 << 20}


def check_network(seconds: float, *, processes: int, machines: Machines | None, report: Path) -> dict[str, Any] | None:
    """Exchange for about ``seconds``; what was measured, on the first machine (None elsewhere). report: where it is kept meanwhile.

    Raises `ConfigError` for a single process, and what `meeting` raises.
    """
    if not placed() and machines is None and processes < 2:
        raise ConfigError(
            "--network: two processes at least exchange something: --processes 8, and for machines --nodes, --node-rank and "
            "--rendezvous as for mllm train"
        )
    with meeting(machines) as met:
        launch(
            measure, processes if machines is None else machines.processes, seconds, str(report), meeting=met,
            needs_group=True,
        )  # fmt: skip
    return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def measure(seconds: float, report: str) -> None:
    """The body of every process; the first one writes ``report``."""
    device = distributed.local_device()
    whole = torch.ones(_BYTES[device.type] // 4, device=device)
    one = torch.ones(1, device=device)
    latency = _each(lambda: dist.all_reduce(one), seconds / 5, device)
    reduce = _each(lambda: dist.all_reduce(whole), 2 * seconds / 5, device)
    count = distributed.world_size()
    places = distributed.gather_objects((socket.gethostname(), os.environ.get("LOCAL_RANK", "0"), fastest_link()))
    leaders = [rank for rank, (_, local, _) in enumerate(places) if local == "0"]
    links = _between(leaders, whole, seconds / 5, device)
    if distributed.is_main():
        found = {
            "processes": count,
            "machines": [places[rank][0] for rank in leaders],
            "device": device.type,
            "latency": latency,
            "bus": 2 * (count - 1) / count * whole.numel() * 4 / reduce,
            "links": links,
            "named": min((places[rank][2] for rank in leaders), key=lambda link: link[1]),
        }
        Path(report).write_text(json.dumps(found), encoding="utf-8")


def _between(
    leaders: list[int], whole: torch.Tensor, seconds: float, device: torch.device
) -> list[tuple[int, int, float]]:
    """(machine, next machine, bytes a second one way) around the ring of machines, one pair at a time."""
    links = []
    pairs = list(zip(range(len(leaders)), [*range(1, len(leaders)), 0]))
    for a, b in pairs[: 1 if len(leaders) == 2 else None] if len(leaders) > 1 else []:
        sends, takes = leaders[a], leaders[b]

        def exchange(sends: int = sends, takes: int = takes) -> None:
            if distributed.rank() == sends:
                dist.send(whole, takes)
            elif distributed.rank() == takes:
                dist.recv(whole, sends)

        took = distributed.gather_objects(_each(exchange, seconds / len(pairs), device))
        links.append((a, b, whole.numel() * 4 / took[takes]))
    return links


def _each(exchange: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Mean seconds of one exchange; the first process says how many are made."""

    def run(times: int) -> float:
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(times):
            exchange()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    run(2)  # connections are made at the first
    one = max(distributed.gather_objects(run(3)))
    times = max(3, min(10_000, int(seconds / max(one, 1e-6))))
    return max(distributed.gather_objects(run(times)))


def fastest_link(root: Path = Path("/sys/class")) -> tuple[str, float]:
    """This machine's fastest network port that is up, as the system names it, and its gigabits a second (0: none is named)."""
    found = [("", 0.0)]
    for path in root.glob("infiniband/*/ports/*/rate"):
        state = path.with_name("state")
        if "ACTIVE" in _text(state).upper():
            found.append((path.parts[-4], float(_text(path).split()[0])))
    if len(found) == 1:
        for path in root.glob("net/*/speed"):
            if _text(path.with_name("operstate")) == "up" and _text(path).lstrip("-").isdigit():
                found.append((path.parent.name, max(0, int(_text(path))) / 1000))
    return max(found, key=lambda link: link[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # a port that is down has no speed to read
        return ""


def verdict(found: dict[str, Any]) -> list[str]:
    """What was measured, what is expected, and what to look at when it is less; a line each."""
    machines = len(found["machines"])
    bus = found["bus"] / 1e9
    lines = [
        f"{found['processes']} processes on {machines} machine(s) ({', '.join(found['machines'])}), {found['device']}",
        f"all-reduce: {bus:.2f} GB/s a process (bus rate), {1e6 * found['latency']:.0f} µs for a single number",
    ]
    lines += [f"machine {a} → {b}: {rate / 1e9:.2f} GB/s" for a, b, rate in found["links"]]
    lines.append(f"the bf16 gradients of a 7B model (14 GB) would take {28 / bus:.2f} s a step, hidden behind backward")
    name, gigabits = found["named"]
    if machines == 1:
        lines.append(
            "expected on one machine: H100 and H200 joined by NVLink 300 GB/s or more, GPUs on PCIe about 20, CPU processes 0.5 to 5"
        )
        return lines
    if not gigabits:
        lines.append(
            "the system names no link's rate; expected: 45 GB/s for 400 Gb/s InfiniBand, 11 for 100 Gb/s, 1.1 for 10 Gb/s"
        )
        return lines
    wanted = _REACHED * gigabits / 8
    lines.append(
        f"expected: {wanted:.1f} GB/s between machines over {name} ({gigabits:.0f} Gb/s), times the ports that NCCL joins"
    )
    slow = [(a, b) for a, b, rate in found["links"] if rate / 1e9 < 0.8 * wanted]
    if slow:
        lines.append(
            "slower than expected: "
            + ", ".join(f"{a} → {b}" for a, b in slow)
            + ". NCCL_DEBUG=INFO says which network is used (NET/IB, or NET/Socket where InfiniBand was not found); "
            "NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it, and GPUDirect wants the kernel module nvidia-peermem"
        )
    return lines
