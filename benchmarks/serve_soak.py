"""Does a server that is asked for minutes on end keep its memory and its open files?

    python benchmarks/serve_soak.py CHECKPOINT [--minutes 10] [--clients 8] [-- options of mllm serve]
    python benchmarks/serve_soak.py --server http://127.0.0.1:8000 --pid PID_OF_MLLM_SERVE

Clients that each ask about a picture of their own, one request in ten broken off in the middle of its answer, by `mllm bench serve`'s own
client; a line of JSON every minute. Before and after it: memory and open files of every process of the server, by their names, and
what a GPU holds. Fails when a request failed, a process is gone, or the server no longer answers. Memory is told and not judged: caches
fill while a server is young, so it is read after the first minute too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serve_h200 import gpu_memory
from mllm.serve.load import Level, Load, run_load


def processes_of(pid: int) -> list[dict[str, Any]]:
    """Every process below one, itself first: pid, name, memory of its own (RssAnon) and all (VmRSS) in MiB, open files, threads."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            below.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop(0)
        waiting += sorted(below.get(one, []))
        try:
            lines = (Path("/proc") / str(one) / "status").read_text().splitlines()
            files = sum(1 for _ in Path(f"/proc/{one}/fd").iterdir())
        except OSError:
            continue
        read = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmRSS" not in read:
            continue
        size = {name: round(int(read[name].split()[0]) / 1024, 1) for name in ("RssAnon", "VmRSS")}
        row = {"pid": one, "name": read["Name"].strip(), "own_mib": size["RssAnon"], "all_mib": size["VmRSS"]}
        found.append({**row, "files": files, "threads": int(read["Threads"])})
    return found


def state(pid: int) -> dict[str, Any]:
    """What the server holds now."""
    rows = processes_of(pid)
    sums = {name: round(sum(row[name] for row in rows), 1) for name in ("own_mib", "all_mib", "files", "threads")}
    return {"at": time.strftime("%H:%M:%S"), **sums, "gpu_mib": gpu_memory(), "processes": rows}


def tell(name: str, found: Any) -> None:
    print(f"RESULT {name} {json.dumps(found)}", flush=True)


def soak(address: str, pid: int, arguments: argparse.Namespace) -> bool:
    """Whether nothing failed and everything is still there."""
    load = Load(
        seconds=60.0, sides=(arguments.least, arguments.most), leaving=0.1, seed=1, max_tokens=arguments.max_tokens
    )
    totals = {"answered": 0, "left": 0, "failed": 0}
    held: list[dict[str, Any]] = []

    def one(level: Level) -> None:
        found = dataclasses.asdict(level)
        held.append(now := state(pid))
        for name in ("answered", "left", "failed"):
            totals[name] += found[name]
        kept = (
            "answered",
            "left",
            "failed",
            "requests_per_second",
            "first_token_ms",
            "latency_ms",
            "errors",
            "client_busy",
        )
        tell(f"minute_{len(held)}", {**{k: found[k] for k in kept}, **{k: now[k] for k in now if k != "processes"}})

    before = state(pid)
    tell("before", before)
    key = os.environ.get("MLLM_API_KEY")
    run_load(address, [arguments.clients] * arguments.minutes, load, api_key=key, pid=pid, tell=one)
    time.sleep(5)  # what clients left behind ends
    after = state(pid)
    tell("after", after)
    health = urllib.request.urlopen(f"{address}/health", timeout=10).status
    gone = {row["pid"] for row in before["processes"]} - {row["pid"] for row in after["processes"]}
    summary = {
        "clients": arguments.clients, "minutes": arguments.minutes, **totals, "health": health, "processes_gone": len(gone),
        "own_mib": [before["own_mib"], held[0]["own_mib"], after["own_mib"]], "told at": "before, after a minute, after all",
        "files": [before["files"], held[0]["files"], after["files"]],
        "threads": [before["threads"], held[0]["threads"], after["threads"]],
        "gpu_mib": [before["gpu_mib"], after["gpu_mib"]],
    }  # fmt: skip
    tell("soak", summary)
    return not totals["failed"] and not gone and health == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--server")
    parser.add_argument("--pid", type=int, help="of mllm serve, where --server names it")
    parser.add_argument("--end", action="store_true", help="end --pid after it")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--least", type=int, default=200, help="pixels of the shortest side")
    parser.add_argument("--most", type=int, default=1200, help="pixels of the longest side")
    typed = sys.argv[1:]
    place = typed.index("--") if "--" in typed else len(typed)
    arguments, options = parser.parse_args(typed[:place]), typed[place + 1 :]
    if arguments.server is None:
        from mllm.serve.app import start_server

        process, address = start_server(arguments.checkpoint, options)
        try:
            well = soak(address, process.pid, arguments)
        finally:
            process.terminate()
            tell("exit_code", process.wait(60))
    else:
        try:
            well = soak(arguments.server, arguments.pid, arguments)
        finally:
            if arguments.end:
                os.kill(arguments.pid, signal.SIGTERM)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
