"""How do several processes share one evaluation on this machine?

mllm eval run CKPT --tasks chartqa --processes 8
torchrun --nproc-per-node 8 -m mllm.cli.main eval run CKPT --tasks chartqa        # the same, by torch's launcher
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from mllm.errors import ConfigError, UnavailableError
from mllm.eval.settings import EvalSettings

PARENT = "MLLM_EVALPARENT"
RUN_ID = "MLLM_EVAL_RUN"


def start_workers(count: int, checkpoint: str, tasks: Sequence[str], settings: EvalSettings) -> None:
    """Call `run_eval` with these arguments in ``count`` processes, each with its RANK, and wait for them.

    When one fails the others are stopped; what they answered is kept, so that the same command goes on from there.
    Raises `UnavailableError` naming the process that failed.
    """
    if count < 2:
        raise ConfigError(f"processes is {count}; expected at least 2 to share a run")
    threads = str(max(1, (os.cpu_count() or 1) // count))
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        PARENT: str(os.getpid()),
        RUN_ID: uuid.uuid4().hex,
    }
    environment = os.environ | common
    environment.setdefault("OMP_NUM_THREADS", threads)
    command = [
        sys.executable,
        "-m",
        "mllm.eval.worker",
        json.dumps([checkpoint, list(tasks), settings.model_dump(mode="json")]),
    ]
    workers = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    try:
        _wait(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code:
                raise UnavailableError(
                    f"process {rank} of {len(workers)} ended with code {code} (its message stands above); the others were "
                    "stopped. Answers are kept: the same command goes on from there"
                )
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def follow(parent: int) -> None:
    """End this process when the one that started it is gone: nobody would wait for its answers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
