"""How do the processes of one run find each other and exchange small things?"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mllm.errors import ConfigError
from mllm.links import VARIABLE, through_meeting_place

_groups_joined = 0
_destroy: Callable[[], Any] | None = None  # what ends the present group, None: torch
_own_folder = ""
_small: Any = None  # gloo group for Python objects and counters; with gloo as the main backend, the main group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def keeps_folder() -> bool:
    """Whether this process writes what the run's folder has once: the first of all, or, where every machine has a folder of its own, the
    first of each machine."""
    return is_main() or (_own_folder != "" and os.environ.get("LOCAL_RANK", "0") == "0")


def keep_own_folders(machine: str) -> None:
    """Until this process's group ends every machine has an output folder of its own; machine: the name of this one."""
    global _own_folder
    _own_folder = machine


def own_folder_of() -> str:
    """The machine whose own folder this process writes; empty where all machines share one."""
    return _own_folder


def local_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own = torch.cuda.device_count() == 1  # Slurm may show each task its GPU alone
    return torch.device("cuda", 0 if own else int(os.environ.get("LOCAL_RANK", "0")))


def _meet_at_launchers_address(dist: Any) -> tuple[Any, int, int]:
    """(store, rank, world size) at MASTER_ADDR and MASTER_PORT. Raises `ConfigError` when another program has that port."""
    try:
        return next(dist.rendezvous("env://"))
    except RuntimeError as error:  # torch's network errors are RuntimeErrors
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT", "")
        raise ConfigError(
            f"MASTER_PORT: port {port} of {socket.gethostname()} is in use by another program; set another before the launcher, the "
            "same on all machines, as MASTER_PORT=29511"
        ) from None


@contextmanager
def _naming_unreachable(process: int, processes: int) -> Iterator[None]:
    """Processes that do not come through to each other, in one line."""
    try:
        yield
    except RuntimeError as error:  # torch's network errors are RuntimeErrors
        text = re.sub(r"\[/\S+\] ", "", str(error).partition("\n")[0])  # where it is in torch's own source
        if not any(mark in text.lower() for mark in ("connect", "timed out", "timeout")):
            raise
        network = os.environ.get(VARIABLE, "the network of its own name")
        raise ConfigError(
            f"process {process} of {processes} on {socket.gethostname()} cannot reach the others over {network} ({text[:200]}). Are all "
            f"ports open between the machines? Another network: {VARIABLE}=…, and NCCL_SOCKET_IFNAME=… on GPUs, as `ip addr` names it"
        ) from error


@contextmanager
def process_group(
    *,
    process: int = 0,
    processes: int = 1,
    init_method: str | None = None,
    always: bool = False,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Join the run's process group for the duration of the block (NCCL on CUDA, Gloo on the CPU).

    init_method: ``file://`` address shared by all processes; None with one process (a group is then made only if
    ``always``, as DeepSpeed needs one), or when the environment of ``torchrun`` is there. A group that exists already
    is used and kept. device: where this process computes; `local_device` if not given.
    """
    global _groups_joined, _small, _destroy, _own_folder
    if dist.is_initialized() or (
        processes == 1 and init_method is None and not always and "WORLD_SIZE" not in os.environ
    ):
        yield
        return
    device = device or local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store: Any = dist
    link: AbstractContextManager[None] = nullcontext()
    options: dict[str, Any] = {"backend": backend, "timeout": timedelta(minutes=30)}
    if init_method is not None:
        options |= {"init_method": init_method, "rank": process, "world_size": processes}
    elif "WORLD_SIZE" not in os.environ:
        options |= {"store": store.HashStore(), "rank": 0, "world_size": 1}
    else:
        # The launcher's store outlives a group, and each group would write its addresses under the same names: a
        # process that joins its second group could read its neighbour's old address and wait for ever.
        shared, process, processes = _meet_at_launchers_address(store)
        prefixed = store.PrefixStore(f"mllm_group_{_groups_joined}", shared)
        options |= {"store": prefixed, "rank": process, "world_size": processes}
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        link = through_meeting_place(*place, prefixed, process=process, processes=processes)
    if device.type == "cuda":
        options["device_id"] = device
    with link:
        with _naming_unreachable(process, processes):
            dist.init_process_group(**options)
            _groups_joined += 1
            _small = dist.new_group(backend="gloo") if backend != "gloo" else dist.group.WORLD
        try:
            yield
        finally:
            destroy, _small, _destroy = _destroy or dist.destroy_process_group, None, None
            _own_folder = ""
            destroy()


def end_group_with(destroy: Callable[[], Any]) -> None:
    """Let ``destroy`` end the present group in place of torch: a library that keeps groups must forget them with it, or
    the next run in this process uses groups that are gone."""
    global _destroy
    _destroy = destroy


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_small)
    return gathered


def sum_numbers(values: list[float]) -> list[float]:
    """Elementwise sum over processes, in fp64 (counts stay exact)."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_small)
    return tensor.tolist()


def largest_number(value: float) -> float:
    """The largest of all processes' values."""
    if world_size() == 1:
        return float(value)
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_small)
    return tensor.item()


def broadcast_state(module: nn.Module) -> None:
    """Rank 0's parameters and buffers to every process."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_small)
