"""Is a training whose optimizer's state lies on NVMe equal to one that keeps it in memory, and resumed exactly?"""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from mllm.train import run_recipe
from tests.integration.train_helpers import make_recipe, metrics

WIDE = {"hidden_size": 160, "intermediate_size": 320}
"""DeepSpeed keeps groups of less than a megabyte in memory."""


def _engine(folder, device: str) -> dict:
    place = {"device": device, "nvme_path": str(folder)}
    return {"zero_optimization": {"stage": 3, "offload_optimizer": place}, "aio": {"thread_count": 1}}


@pytest.mark.slow
@pytest.mark.nightly
def test_state_on_nvme_trains_like_state_in_memory_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    """Compiles DeepSpeed's own library once, some minutes; only where libaio is installed."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio and its headers are not installed")

    def recipe(device: str):
        stage = {"name": "sft", "steps": 4, "batch_size": 1, "save_every": 2, "engine": _engine(tmp_path, device)}
        made = make_recipe(tmp_path, stages=[stage])
        made.model.language_model.config.update(WIDE)
        return made

    run_recipe(recipe("cpu"), output=tmp_path / "memory")
    run_recipe(recipe("nvme"), output=tmp_path / "disk")
    assert list(tmp_path.glob("zero_stage_3/**/*.tensor.swp")), "nothing was written to the disk"
    run_recipe(recipe("nvme"), output=tmp_path / "stopped", stop_after=2)
    final = run_recipe(recipe("nvme"), output=tmp_path / "stopped", resume=True)
    assert metrics(tmp_path / "memory") == metrics(tmp_path / "disk") == metrics(tmp_path / "stopped")
    wanted = load_file(tmp_path / "memory" / "final" / "model.safetensors")
    for folder in (tmp_path / "disk" / "final", final):
        found = load_file(folder / "model.safetensors")
        assert all((wanted[name] == found[name]).all() for name in wanted)
