"""Does the installed vLLM still have the private parts that our scheduler and processor stand on?"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from mllm.serve.vllm.private import PRIVATE, moved


def test_every_private_name_is_where_we_expect_it():
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    (package,) = set(metadata.packages_distributions()["vllm"])
    assert moved(Path(next(iter(found.submodule_search_locations))), metadata.version(package)) == []


def test_a_name_that_moved_is_told_with_what_stands_on_it(tmp_path):
    for part in PRIVATE:
        for name in part.names:
            path = tmp_path / part.files[-1].replace("*", "all")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"    def {name}(self):\n")
    assert moved(tmp_path, "0.33.0") == []
    path = tmp_path / "v1/core/sched/scheduler.py"
    path.write_text(path.read_text().replace("def _preempt_request", "def _preempt"))
    (line,) = moved(tmp_path, "0.33.0")
    assert line.startswith("_preempt_request is in none of v1/core/sched/scheduler.py") and "drawing" in line


def test_what_only_newer_releases_have_is_asked_of_them_alone(tmp_path):
    everything = moved(tmp_path, "0.31.0")
    assert any("_get_hf_mm_inputs" in line for line in everything)
    assert not any("_get_hf_mm_inputs" in line for line in moved(tmp_path, "0.30.2"))
    assert len(everything) == sum(len(part.names) for part in PRIVATE)
