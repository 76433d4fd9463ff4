"""Does the benchmark of a server compare what it measured, and end what it started?"""

from __future__ import annotations

import json
import os
import subprocess
import time

from benchmarks.serve_engines import ratios as ratios_of_engines
from benchmarks.serve_h200 import run_section
from benchmarks.serve_http import ratios, report


def test_rates_are_shares_of_ours_in_process_and_of_llavas_over_http():
    found = {
        "inside": {"requests_per_s": 40.0},
        "default": {"requests_per_s": 36.0},
        "llava": {"requests_per_s": 30.0},
        "api1": {"error": "left out: no time left"},
    }
    made = ratios(found)
    assert made["of ours in process"] == {"default": 0.9, "llava": 0.75}
    assert made["of LLaVA over HTTP"] == {"default": 1.2}
    assert ratios({"inside": {"error": "x"}, "default": {"requests_per_s": 1.0}})["of ours in process"] == {}
    tiny = report(found, made, tiny=True)
    assert "No figure here says anything about speed" in tiny and "No figure" not in report(found, made, tiny=False)
    assert [json.loads(line.split(" ", 2)[2]) for line in tiny.splitlines() if line.startswith("RESULT")] == [
        *found.values()
    ]


def test_two_engines_are_compared_with_one_under_as_many_requests_each():
    one = {
        "burst_128": {"requests_per_s": 40.0},
        "burst_256": {"requests_per_s": 44.0},
        "sustained": {"requests_per_s": 45.0},
    }
    two = {
        "burst_128": {"requests_per_s": 60.0},
        "burst_256": {"requests_per_s": 78.0},
        "sustained": {"requests_per_s": 90.0},
    }
    assert ratios_of_engines({"two": two, "one": one}) == {
        "two": {
            "128 at once an engine": 1.95,
            "128 at once in all": 1.5,
            "256 at once in all": 1.773,
            "128 clients an engine": 2.0,
        }
    }
    assert ratios_of_engines({"two": {"error": "x"}, "one": one}) == {}


def test_a_section_that_runs_too_long_leaves_no_server_behind(tmp_path):
    """`mllm serve` gives vLLM a session of its own, and what was left held the GPU's memory before the next section."""
    file = tmp_path / "pid"
    script = f"setsid sleep 600 & echo $! > {file}; wait"
    result = run_section(["bash", "-c", script], dict(os.environ), 3.0, tmp_path / "log")
    assert result["error"] == "stopped after 3 s"
    pid = int(file.read_text())
    for _ in range(100):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if not state.strip() or state.startswith("Z"):
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    raise AssertionError("the server of a section that was stopped still runs")
