"""Has a training process on the CPU imported, before it begins, what every run imports late?"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from mllm.train.preloaded import LATE, OURS
from tests.integration.kill_points import in_a_process
from tests.integration.train_helpers import make_recipe


def _train_and_tell(folder: Path) -> None:
    from mllm.train import run_recipe

    told = {"lacking": [name for name in (*OURS, *LATE) if name not in sys.modules], "frozen": gc.get_freeze_count()}
    told["pool"] = os.environ.get("TORCH_WARM_POOL")
    before, began = set(sys.modules), time.process_time()
    stages = [{"name": "two", "steps": 1, "engine": "zero2"}, {"name": "none", "steps": 1, "engine": "none"}]
    run_recipe(make_recipe(folder, stages=stages, rows=6), output=folder / "run")
    told["late"] = sorted(set(sys.modules) - before)
    print(f"{time.process_time() - began:.1f} s of CPU, {len(told['late'])} modules of its own")
    (folder / "told.json").write_text(json.dumps(told))


def test_a_process_that_is_forked_imports_next_to_nothing_of_its_own(tmp_path):
    """Each import here is paid by every process of every run: DeepSpeed's engine alone was 700 modules and 4 s."""
    assert in_a_process(_train_and_tell, tmp_path) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    installed = [name for name in told["lacking"] if importlib.util.find_spec(name.partition(".")[0])]
    assert not installed and told["frozen"] > 100_000
    late = [name for name in told["late"] if not name.startswith(("PIL.", "tests.", "mllm."))]
    assert len(late) < 100, late
    assert told["pool"] == os.environ.get("TORCH_WARM_POOL"), "torch's own processes are only kept from starting before"
