"""How do tests start a real server?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, free_port

KEY, OPERATOR = "a-key-for-the-test", "a-key-of-the-operator"


VLLM_ON_CPU = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of a process that runs vLLM in a test."""


@contextmanager
def serving(checkpoint: str, log: Path, *options: str, **variables: str) -> Iterator[Any]:
    """A client of ``mllm serve`` on a CPU, as model ``tiny``, with these environment ``variables``; the server (``client.server``, its
    process) ends with the block, well."""
    import httpx

    port = free_port()
    environment = {**os.environ, **VLLM_ON_CPU, "MLLM_API_KEY": KEY, "MLLM_ADMIN_KEY": OPERATOR, **variables}
    command = [sys.executable, "-m", "mllm.cli.main", "serve", checkpoint, "--port", str(port), "--name", "tiny"]
    command += [
        "--eager",
        "--dtype",
        "float32",
        "--verbose",
        *options,
        "--",
        "--block-size",
        "32",
        "--max-num-seqs",
        "8",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    client: Any = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=120, headers={"authorization": f"Bearer {KEY}"}
    )
    client.server = process
    try:
        deadline = time.time() + 900
        while True:
            if process.poll() is not None or time.time() > deadline:
                pytest.fail("the server did not start:\n" + log.read_text(errors="replace")[-4000:])
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield client
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode == 0, log.read_text(errors="replace")[-2000:]
