"""What of the engine's speed is left over HTTP? One call on a machine with one GPU, at most nine minutes.

    python benchmarks/serve_http.py [--budget 520] [--small]

The same 128 requests (`benchmarks/serve_h200.py`: one 640×480 JPEG, 64 tokens, caches off, no downloads) to our engine in process,
to `mllm serve` with one process for HTTP, with as many as it takes by itself, and to vLLM's own LLaVA-7B over HTTP. Prints a line of
JSON for each and the ratios: the goal is 0.9 of our own rate in process. ``--small``: a tiny model on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SECTIONS = ("ours_eager", "served_eager", "served_llava_eager", "served_eager_api1")
"""The most important first: what would begin too late is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds; sections that would begin later are left out"
    )
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    script = Path(__file__).with_name("serve_h200.py")
    command = [sys.executable, str(script), "--sections", ",".join(SECTIONS), "--budget", str(arguments.budget)]
    rates: dict[str, float | None] = {}
    with subprocess.Popen(
        [*command, *(["--small"] if arguments.small else [])], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("RESULT "):
                _, name, found = line.split(" ", 2)
                rates[name] = json.loads(found).get("requests_per_s")
    inside = rates.get("ours_eager")
    ratios = {name: round(rate / inside, 3) for name, rate in rates.items() if inside and rate and name != "ours_eager"}
    print("HTTP " + json.dumps({"requests_per_s": rates, "of our rate in process": ratios}), flush=True)
    raise SystemExit(process.returncode)


if __name__ == "__main__":
    main()
