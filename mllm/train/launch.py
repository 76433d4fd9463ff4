"""How does one command become several training processes?"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mllm import errors, progress
from mllm.distributed import process_group
from mllm.errors import ConfigError, Interrupted, MllmError
from mllm.machines import placed
from mllm.noise import hush
from mllm.stopping import Asked, asked_to_stop
from mllm.train.gpu_memory import tell_busy_gpu
from mllm.train.meeting import GO_ON, MachineLost, Meeting

PRELOADED = ("mllm.train.preloaded",)
MEET = "MEET"
_BROKEN_LINES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "Socket Timeout",
)
"""What gloo and NCCL say of a neighbour that is gone."""


class WorkerFailed(MllmError, RuntimeError):
    """A training process ended before its time; the message says which and why."""


def launch(
    function: Callable[..., Any],
    processes: int,
    *arguments: Any,
    needs_group: bool = False,
    meeting: Meeting | None = None,
) -> None:
    """Run ``function(*arguments)`` in ``processes`` processes that form one process group; returns when all have ended.

    One process runs right here. Under a launcher (``torchrun``, ``srun``, DeepSpeed's) this process joins that run's group instead of
    starting others. meeting: the other machines of the run, whose processes join the same group. function must be importable by
    name. Raises `WorkerFailed` when a process dies, `MachineLost` when another machine ends; the others are ended then.
    """
    if placed() or (processes == 1 and meeting is None):
        lone = contextlib.nullcontext() if not placed() else _naming_lost_machines()
        with lone, process_group(always=needs_group):
            tell_busy_gpu()
            function(*arguments)
        return
    available = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > available:
        raise ConfigError(f"--processes {processes}: this machine has {available} GPU(s)")
    folder = tempfile.mkdtemp(prefix="mllm-launch-")
    progress.tell(f"starting {processes} processes …")
    try:
        _start(function, processes, arguments, folder, meeting)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    function: Callable[..., Any], processes: int, arguments: tuple, folder: str, meeting: Meeting | None
) -> None:
    multiprocessing: Any = importlib.import_module("torch.multiprocessing")
    # On CUDA every process starts afresh (a forked one cannot use the GPU). On the CPU one server imports everything once
    # and the processes are forked from it, which halves the start on two cores.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([function.__module__, *PRELOADED])
    alive, ours = context.Pipe(duplex=False)
    asked = Asked()
    try:
        started = multiprocessing.start_processes(
            _worker,
            args=(function, arguments, _places(processes, folder, meeting), folder, alive),
            nprocs=processes,
            start_method=method,
            join=False,
        )
        with asked_to_stop(True, lambda _: _pass_on(started)) as asked:
            _wait(started, meeting)
        _raise_if_stopped(folder)
    except MachineLost:
        _raise_if_stopped(folder)  # that one was told to stop as well, and was done with it first
        raise
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        _raise_if_stopped(folder)
        if asked.by and not list(Path(folder).glob("error-*")):
            raise KeyboardInterrupt from None  # before the first step nothing waits for a step's end
        for path in sorted(Path(folder).glob("error-*")):  # a user's error needs no traceback of ours
            kind, _, message = path.read_text(encoding="utf-8").partition("\n")
            raise getattr(errors, kind, WorkerFailed)(message) from None
        # A neighbour that is cut off shows as an error of whatever waits for it.
        if meeting is not None and (news := meeting.wait_for_news()):
            raise MachineLost(news) from None
        raise WorkerFailed(f"a training process ended early: {error}") from None
    finally:
        ours.close()


def _pass_on(started: Any) -> None:
    """A request to stop, to the processes: whoever sends it may know the launcher alone."""
    for process in started.processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)


def _raise_if_stopped(folder: str) -> None:
    for path in sorted(Path(folder).glob("stopped-*")):
        raise Interrupted(path.read_text(encoding="utf-8"))


def _wait(started: Any, meeting: Meeting | None) -> None:
    """Until all processes have ended. Raises `MachineLost`, with these ended too, when another machine did."""
    while not started.join(timeout=None if meeting is None else 0.5):
        if meeting is not None and (news := meeting.news()):
            with contextlib.suppress(Exception):
                started.join(timeout=2.0)  # they may have an error of their own to tell, which is the same
                for process in started.processes:
                    process.kill()
                    process.join()
            raise MachineLost(news)


def _places(processes: int, folder: str, meeting: Meeting | None) -> dict[str, str]:
    """What torchrun would set for all processes of this machine; without other machines they meet in a file."""
    # accelerate (TRL's trainers) takes processes without LOCAL_WORLD_SIZE for many machines.
    local = {"LOCAL_WORLD_SIZE": str(processes)}
    if meeting is None:
        return {**local, "WORLD_SIZE": str(processes), "GROUP_RANK": "0", MEET: f"file://{folder}/meet"}
    machines = meeting.machines
    return {
        **local,
        "WORLD_SIZE": str(processes * machines.nodes),
        "GROUP_RANK": str(machines.node_rank),
        "MASTER_ADDR": machines.host,
        "MASTER_PORT": str(machines.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the first machine's command listens, not its first process
    }


def _worker(
    process: int, function: Callable[..., Any], arguments: tuple, places: dict[str, str], folder: str, alive: Any
) -> None:
    processes = int(places["LOCAL_WORLD_SIZE"])
    rank = int(places["GROUP_RANK"]) * processes + process
    meet = places.pop(MEET, None)
    os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(process))
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    hush()
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        with process_group(process=rank, processes=int(places["WORLD_SIZE"]), init_method=meet):
            tell_busy_gpu()
            function(*arguments)
    except Interrupted as stop:
        (Path(folder) / f"stopped-{process}").write_text(str(stop), encoding="utf-8")
    except MllmError as error:
        kind = "ConfigError" if isinstance(error, errors.ConfigError) else type(error).__name__
        (Path(folder) / f"error-{process}").write_text(f"{kind}\n{error}", encoding="utf-8")
        raise


@contextlib.contextmanager
def _naming_lost_machines() -> Iterator[None]:
    """Under another launcher nobody else says why a neighbour's end is an error here."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, MllmError) or not any(mark in text for mark in _BROKEN_LINES):
            raise
        lost = MachineLost(f"another process of this run is gone ({text.partition(chr(10))[0][:200]}). {GO_ON}")
        lost.told_by = "LOCAL_RANK"
        raise lost from error


def _end_with_launcher(alive: Any) -> None:
    """A killed launcher must not leave processes that train on, or wait for a dead neighbour: its end closes the
    pipe."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(1)
