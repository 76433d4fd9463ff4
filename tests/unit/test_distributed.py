"""Do processes find each other again and again?"""

from __future__ import annotations

from tests.helpers import torchrun

MANY_GROUPS = """
import random, time
import torch, torch.distributed as dist
from mllm.distributed import gather_objects, process_group, rank
for turn in range(20):
    with process_group():
        assert gather_objects((turn, rank())) == [(turn, 0), (turn, 1)]
    assert not dist.is_initialized()
    time.sleep(random.random() * 0.05)
"""


def test_one_process_after_another_joins_a_new_group(tmp_path):
    """Two runs in one script: torch's launcher keeps its store, with the addresses of the group before."""
    script = tmp_path / "go.py"
    script.write_text(MANY_GROUPS)
    torchrun(script, timeout=120)
