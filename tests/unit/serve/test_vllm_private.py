"""Does the installed vLLM still have the private parts that our scheduler and processor stand on?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mllm.serve.vllm.private import PRIVATE, moved


def test_every_private_name_is_where_we_expect_it():
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    assert moved(Path(next(iter(found.submodule_search_locations)))) == []


def test_a_name_that_moved_is_told_with_what_stands_on_it(tmp_path):
    for part in PRIVATE:
        for name in part.names:
            path = tmp_path / part.files[-1].replace("*", "all")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"    def {name}(self):\n")
    assert moved(tmp_path) == []
    path = tmp_path / "v1/core/sched/scheduler.py"
    path.write_text(path.read_text().replace("def _preempt_request", "def _preempt"))
    (line,) = moved(tmp_path)
    assert line.startswith("_preempt_request is in none of v1/core/sched/scheduler.py") and "drawing" in line
