"""Do processes find each other again and again?"""

from __future__ import annotations

import socket

import pytest

from mllm.distributed import process_group
from mllm.errors import ConfigError
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


def test_a_launchers_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(ConfigError, match=f"MASTER_PORT: port {port} of .* is in use by another program"),
            process_group(),
        ):
            pass
