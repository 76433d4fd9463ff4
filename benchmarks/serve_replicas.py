"""Does a proxy before two real replicas keep a picture with one of them, and does a replica that leaves lose nothing?

    python benchmarks/serve_replicas.py [--work FOLDER]

Two `mllm serve` of one tiny checkpoint on ports 8001 and 8002, and nginx with ``examples/nginx.conf`` exactly as it is printed, on
port 8000. Asked through the proxy, with the header that our own clients send:

1. every picture several times: which replica ran its encoders, and how often
2. clients go on asking, every second one for a stream, while one replica gets SIGTERM: no request may fail, and it ends with 0
3. that replica comes back: its pictures return to it
4. clients go on asking while the other one is killed (SIGKILL to all its processes): what was being answered there is lost, everything
   after it is answered

Ports are the file's own, so nothing else may listen there. Prints a line of JSON for each; fails where a line is not as it must be.
``--sections affinity,killed`` leaves out the others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serve_h200 import descendants
from benchmarks.servers import ROOT, Server, heading, picture_url, question, start, tiny_checkpoint
from mllm.serve.http.client import affinity

PROXY, PORTS = "http://127.0.0.1:8000", (8001, 8002)
PICTURES, TIMES = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "serve_replicas")
    parser.add_argument("--sections", default="affinity,drained,killed")
    arguments = parser.parse_args()
    wanted = arguments.sections.split(",")
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(heading("python benchmarks/serve_replicas.py"), flush=True)
    checkpoint = tiny_checkpoint("routed", arguments.work)
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        raise SystemExit("nginx is not installed: apt-get install nginx-light")
    replicas = [start(checkpoint, arguments.work / f"{port}.log", port) for port in PORTS]
    folder = arguments.work / "proxy"
    folder.mkdir(exist_ok=True)
    proxy = subprocess.Popen([nginx, "-p", str(folder), "-c", str(ROOT / "examples/nginx.conf")])
    try:
        tell("ready_after_s", [replica.wait() for replica in replicas])
        places = told_places(replicas)
        if "drained" in wanted:
            drained(replicas, checkpoint, arguments.work, places)
        if "killed" in wanted:
            killed(replicas)
    finally:
        proxy.terminate()
        proxy.wait(10)
        for replica in replicas:
            replica.end()


def tell(name: str, found: Any) -> None:
    print(f"RESULT {name} {json.dumps(found)}", flush=True)


def images_of(replica: Server) -> int:
    """Pictures that a replica's first encoder has seen since its start."""
    parts = httpx.get(f"{replica.address}/mllm/stats", timeout=60).json()["workers"][0]
    return parts["semantic"]["images"]


def asked_of(replica: Server) -> int:
    """Pictures that a replica was asked about."""
    lines = httpx.get(f"{replica.address}/metrics", timeout=60).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("mllm_pictures_total{"))


def ask(number: int, **more: Any) -> httpx.Response:
    body = question("what?", picture_url(number), **more)
    return httpx.post(f"{PROXY}/v1/chat/completions", json=body, headers=affinity(body), timeout=120)


def told_places(replicas: list[Server]) -> dict[int, int]:
    """Which replica each picture goes to; asked several times, it must be one, and its encoders must have run once."""
    places, seen, encoded = {}, [asked_of(one) for one in replicas], [images_of(one) for one in replicas]
    for number in range(PICTURES):
        for _ in range(TIMES):
            assert ask(number).status_code == 200
        now = [asked_of(one) for one in replicas]
        grown = [after - before for before, after in zip(seen, now)]
        assert sorted(grown) == [0, TIMES], f"picture {number} went to both: {grown}"
        places[number], seen = grown.index(TIMES), now
    ran = [after - images_of_before for images_of_before, after in zip(encoded, [images_of(one) for one in replicas])]
    counted = Counter(places.values())
    tell("affinity", {"pictures": PICTURES, "times": TIMES, "to each replica": dict(counted), "encoder ran on": ran})
    assert len(counted) == 2 and ran == [counted[0], counted[1]], "a picture was encoded more than once"
    return places


async def keep_asking(seconds: float, happens: Any, after: float, clients: int = 6) -> dict[str, Any]:
    """Clients that ask through the proxy, every second one for a stream, while something ``happens``; what they saw."""
    counts: Counter[str] = Counter()
    lost: list[dict[str, Any]] = []
    begun = time.monotonic()
    happened: list[float] = []
    slowest = 0.0

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        nonlocal slowest
        place = 0
        while time.monotonic() - begun < seconds:
            place += 1
            streams = (number + place) % 2 == 0
            body = question("what is it?", picture_url((number * 7 + place) % 40), stream=streams, max_tokens=48)
            sent = time.monotonic()
            error = ""
            try:
                async with session.post("/v1/chat/completions", json=body, headers=affinity(body)) as answer:
                    text = await answer.text()
                    if answer.status != 200:
                        error = f"status {answer.status}: {text[:120]}"
                    elif streams and ("[DONE]" not in text or '"error"' in text):
                        error = "the stream broke off"
            except aiohttp.ClientError as problem:
                error = f"{type(problem).__name__}: {str(problem)[:120]}"
            slowest = max(slowest, time.monotonic() - sent)
            counts["failed" if error else "answered"] += 1
            if error:
                lost.append({"sent_s": round(sent - begun, 2), "stream": streams, "error": error})

    async def event() -> None:
        await asyncio.sleep(after)
        happened.append(round(time.monotonic() - begun, 2))
        happens()

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(PROXY, timeout=timeout) as session:
        await asyncio.gather(event(), *(client(number, session) for number in range(clients)))
    return {"clients": clients, "seconds": round(time.monotonic() - begun, 1), "happened_at_s": happened[0], **counts,
            "slowest_s": round(slowest, 2), "lost": lost}  # fmt: skip


def drained(replicas: list[Server], checkpoint: str, work: Path, places: dict[int, int]) -> None:
    """SIGTERM to the first replica; then it comes back."""
    first = replicas[0]
    found = asyncio.run(keep_asking(20, lambda: first.process.send_signal(signal.SIGTERM), 6))
    code = first.end()
    tell("drained", {**found, "exit_code": code})
    assert not found["lost"] and code == 0, "a replica that was told to end lost a request"
    replicas[0] = start(checkpoint, work / "8001.log", PORTS[0])
    ready = replicas[0].wait()
    time.sleep(11)  # fail_timeout of the proxy's file
    before = asked_of(replicas[0])
    mine = [number for number, place in places.items() if place == 0]
    answers = [ask(number).status_code for number in mine]
    tell("back", {"ready_after_s": ready, "its pictures": len(mine), "came back": asked_of(replicas[0]) - before})
    assert answers == [200] * len(mine) and asked_of(replicas[0]) - before == len(mine)


def killed(replicas: list[Server]) -> None:
    """SIGKILL to every process of the second replica."""
    second = replicas[1].process

    def kill() -> None:
        for pid in [second.pid, *descendants(second.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    found = asyncio.run(keep_asking(20, kill, 6))
    late = [one for one in found["lost"] if one["sent_s"] > found["happened_at_s"]]
    tell("killed", {**found, "lost though sent after it": len(late)})
    assert not late and len(found["lost"]) <= found["clients"], "a dead replica was not passed over"


if __name__ == "__main__":
    main()
