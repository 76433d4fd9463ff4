"""How does one command become several training processes?"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mllm import errors, progress
from mllm.distributed import process_group
from mllm.errors import ConfigError, MllmError
from mllm.noise import hush

PRELOADED = ("mllm.models.build", "mllm.train.run", "mllm.train.stages.sft")


class WorkerFailed(MllmError, RuntimeError):
    """A training process ended before its time; the message says which and why."""


def launch(function: Callable[..., Any], processes: int, *arguments: Any, needs_group: bool = False) -> None:
    """Run ``function(*arguments)`` in ``processes`` processes that form one process group; returns when all have ended.

    One process runs right here. Under ``torchrun`` this process joins that run's group instead of starting others.
    function must be importable by name. Raises `WorkerFailed` when a process dies; the others are ended then.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or processes == 1:
        with process_group(always=needs_group):
            function(*arguments)
        return
    available = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > available:
        raise ConfigError(f"--processes {processes}: this machine has {available} GPU(s)")
    folder = tempfile.mkdtemp(prefix="mllm-launch-")
    progress.tell(f"starting {processes} processes …")
    try:
        _start(function, processes, arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(function: Callable[..., Any], processes: int, arguments: tuple, folder: str) -> None:
    multiprocessing: Any = importlib.import_module("torch.multiprocessing")
    # On CUDA every process starts afresh (a forked one cannot use the GPU). On the CPU one server imports everything once
    # and the processes are forked from it, which halves the start on two cores.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([function.__module__, *PRELOADED])
    alive, ours = context.Pipe(duplex=False)
    try:
        multiprocessing.start_processes(
            _worker,
            args=(function, processes, arguments, f"file://{folder}/meet", folder, alive),
            nprocs=processes,
            start_method=method,
        )
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        for path in sorted(Path(folder).glob("error-*")):  # a user's error needs no traceback of ours
            kind, _, message = path.read_text(encoding="utf-8").partition("\n")
            raise getattr(errors, kind, WorkerFailed)(message) from None
        raise WorkerFailed(f"a training process ended early: {error}") from None
    finally:
        ours.close()


def _worker(
    process: int,
    function: Callable[..., Any],
    processes: int,
    arguments: tuple,
    init_method: str,
    folder: str,
    alive: Any,
) -> None:
    # As torchrun sets them; accelerate (TRL's trainers) takes processes without LOCAL_WORLD_SIZE for many machines.
    total = str(processes)
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=total, LOCAL_WORLD_SIZE=total)
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    hush()
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        with process_group(process=process, processes=processes, init_method=init_method):
            function(*arguments)
    except MllmError as error:
        kind = "ConfigError" if isinstance(error, errors.ConfigError) else type(error).__name__
        (Path(folder) / f"error-{process}").write_text(f"{kind}\n{error}", encoding="utf-8")
        raise


def _end_with_launcher(alive: Any) -> None:
    """A killed launcher must not leave processes that train on, or wait for a dead neighbour: its end closes the
    pipe."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(1)
