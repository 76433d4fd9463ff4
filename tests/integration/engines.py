"""How does each of the tests' engines get a process of its own without importing vLLM anew?

One process imports vLLM, which takes a third of an engine's start, and forks for each command that it is given. It is alone with its
imports: vLLM patches transformers, and no other test may see that.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path

from tests.helpers import ROOT
from tests.integration.serving import VLLM_ON_CPU


def run(*command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """What ``python COMMAND`` says and returns, forked from the process that has imported vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([command, str(out), str(err), timeout]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks engines is gone"
        return subprocess.CompletedProcess(command, int(answer), *(p.read_text(errors="replace") for p in (out, err)))


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, **VLLM_ON_CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.engines"],
        env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def main() -> None:
    """Serve commands, one a line, until the tests are over."""
    import vllm.v1.worker.cpu_worker
    from vllm import LLM, SamplingParams

    import mllm.serve.parity

    del vllm, LLM, SamplingParams, mllm
    answers = os.dup(1)
    os.dup2(2, 1)
    threads = {
        (task / "comm").read_text().strip()
        for task in Path("/proc/self/task").iterdir()
        if task.name != str(os.getpid())
    }
    assert threads <= {"jemalloc_bg_thd"}, f"{threads} would not be there after a fork (jemalloc's own is made again)"
    for line in sys.stdin:
        command, out, err, timeout = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(command, out, err, timeout)
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(command: list[str], out: str, err: str, timeout: float) -> None:
    code = 1
    signal.alarm(int(timeout))
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
