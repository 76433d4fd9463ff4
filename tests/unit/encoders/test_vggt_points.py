"""Does the point head say what VGGT's says, and is it read out of a whole checkpoint?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.vggt_points import LAYERS, PointHead, PointReader, place_waves
from mllm.errors import CheckpointError, ConfigError
from tests.golden.fill import check, fill, fill_all, load
from tests.unit.encoders.views import build, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = {**VggtEncoder.tiny(), "depth": 4, "layers": [1, 2, 3, 4], "patch_embed": "conv", "keep_prefix": False}


@torch.no_grad()
def test_the_head_says_what_vggts_says():
    meta, _, outputs = load(GOLDEN / "vggt_points.json")
    head = PointHead(64, channels=(8, 12, 16, 16), fused=16)
    head.load_state_dict({name: torch.from_numpy(value) for name, value in fill_all(meta).items()})
    layers = [
        torch.from_numpy(fill(f"input.layer_{k}", (1, 2, 14, 64), meta["seed"], "normal"))[0, :, 2:] for k in range(4)
    ]
    points, confidence = head(layers, (3, 4))
    assert points.std() > 1e-3
    have = {"output.two.points": points[None].numpy(), "output.two.confidence": confidence[None].numpy()}
    check({"tolerance": {"atol": 2e-6, "rtol": 1e-5}}, outputs, have)


def test_waves_know_column_from_row():
    waves = place_waves(torch.zeros(1, 8, 3, 5), (42, 70))
    assert waves.shape == (1, 8, 3, 5)
    assert torch.equal(waves[:, :4], waves[:, :4, :1].expand(-1, -1, 3, -1)), "the first half tells the column"
    assert torch.equal(waves[:, 4:], waves[:, 4:, :, :1].expand(-1, -1, -1, 5)), "the second half the row"


@torch.no_grad()
def test_a_reader_is_read_out_of_a_whole_checkpoint(tmp_path):
    donor = PointReader(stirred(SMALL))
    state = {f"aggregator.{k}": v for k, v in donor.encoder.model.state_dict().items()}
    state |= {f"point_head.{k}": v for k, v in donor.head.state_dict().items()}
    state |= {f"depth_head.{k}": torch.zeros_like(v) for k, v in donor.head.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    reader = PointReader(build(SMALL, weights={"source": str(tmp_path)}))
    reader.load()
    pixels = torch.rand(3, 3, 16, 20)
    points, confidence = reader.read(pixels, at_once=2)
    assert points.shape == (3, 16, 20, 3) and confidence.shape == (3, 16, 20) and confidence.min() >= 1
    torch.testing.assert_close((points, confidence), donor.read(pixels))
    headless = {k: v for k, v in state.items() if not k.startswith("point_head.")}
    save_file({k: v.contiguous() for k, v in headless.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="point_head"):
        reader.load()


def test_other_layers_are_refused():
    assert len(LAYERS) == 4
    with pytest.raises(ConfigError, match=r"reads four layers; the encoder gives \[-1\]"):
        PointReader(build(VggtEncoder.tiny()))
