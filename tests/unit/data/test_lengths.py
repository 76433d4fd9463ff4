"""Are rows counted by several processes as by one, and is a process started only where it is worth it?"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

from mllm.data.lengths import ROWS_A_PROCESS, counting_processes, measure
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec


def words(sample) -> int:
    return sum(len(turn.content.split()) for turn in sample.turns)


def test_two_processes_count_as_one_does_and_tell_how_far_they_are(tmp_path):
    rows = [
        {"id": str(k), "conversations": [{"from": "human", "value": "a " * k}, {"from": "gpt", "value": "b"}]}
        for k in range(1, 1101)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = open_source(DatasetSpec(name="rows", format="llava", path=str(tmp_path / "rows.json")))
    told: list[int] = []
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    several = measure(source, words, processes=2, progress=told.append)
    assert np.array_equal(several, measure(source, words))
    assert several.tolist() == list(range(2, 1102)) and sum(told) == 1100
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


AFTER_THREADS = """
import json, sys
import torch
torch.set_num_threads(2)
torch.randn(1 << 21).exp().sum()  # OpenMP's threads are there now; a fork has none of them
from mllm.data.parallel import spread
def work(part):
    return float(torch.full((1 << 20,), float(part)).exp().log().mean())
print(json.dumps([round(found, 3) for found in spread(work, [1, 2, 3], 2)]))
"""


def test_processes_forked_after_torch_used_its_threads_do_not_wait_for_them():
    """Training plans its batches after the model is built; it stood still there from 4,000 rows on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", AFTER_THREADS], env=environment, capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr.decode()[-2000:]
    assert json.loads(found.stdout) == [1, 2, 3]


def test_small_data_start_no_process_and_large_ones_no_more_than_there_are_cores():
    assert counting_processes(ROWS_A_PROCESS - 1) == 1
    assert counting_processes(10**9) == len(os.sched_getaffinity(0))
