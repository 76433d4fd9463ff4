"""Does the encoder compute what π³ computes up to its heads, and are all views alike to it?"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.pi3 import Pi3Encoder
from mllm.errors import CheckpointError
from tests.golden.fill import check, fill_all, load
from tests.unit.encoders.views import SMALL_PI3, build, check_gradients, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = Pi3Encoder.tiny()


@torch.no_grad()
def test_the_decoders_output_from_a_whole_checkpoint(tmp_path):
    meta, inputs, outputs = load(GOLDEN / "pi3.json")
    state = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    state |= {
        "point_decoder.projects.weight": torch.zeros(2),
        "camera_head.fc.bias": torch.zeros(3),
        "image_mean": torch.zeros(3),
    }
    save_file(state, tmp_path / "model.safetensors")
    config = {"type": "pi3", **SMALL_PI3, "keep_prefix": True, "weights": {"source": str(tmp_path)}}
    encoder = build_encoder(encoder_config(config, where="e")).eval()
    encoder.load_pretrained()
    three, one = (torch.from_numpy(inputs[f"input.{name}"])[0] for name in ("three", "one"))
    features = encoder(torch.cat([three, one]), scene_ids=torch.tensor([4, 4, 4, 1]))
    have = torch.cat([features.prefix, features.tokens], dim=1)
    check(meta, outputs, {"output.three.all": have[:3].numpy(), "output.one.all": have[3:].numpy()})
    with pytest.raises(CheckpointError, match="deeper than depth: 1"):
        build_encoder(encoder_config({**config, "depth": 1}, where="e")).load_pretrained()
    with pytest.raises(CheckpointError, match=r"missing: decoder\.4\."):
        build_encoder(encoder_config({**config, "depth": 3}, where="e")).load_pretrained()


@torch.no_grad()
@pytest.mark.parametrize("layers", [[-1], [1, 2]])
def test_views_in_another_order_give_the_same_in_that_order(layers):
    encoder = stirred(TINY, layers=layers)
    pixels, order = torch.rand(5, 3, 16, 20), torch.tensor([3, 0, 4, 2, 1])
    ids = torch.tensor([0, 0, 0, 1, 1])
    found, moved = encoder(pixels, scene_ids=ids), encoder(pixels[order], scene_ids=ids[order])
    torch.testing.assert_close(moved.tokens, found.tokens[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.prefix, found.prefix[order], atol=1e-4, rtol=1e-4)
    alone = encoder(pixels[:3], scene_ids=torch.zeros(3))
    torch.testing.assert_close(alone.tokens, found.tokens[:3], atol=1e-5, rtol=1e-5)
    assert (encoder(pixels[:2], scene_ids=torch.zeros(2)).tokens - found.tokens[:2]).abs().max() > 1e-2


@torch.no_grad()
def test_a_long_scene_is_read_in_parts_that_each_see_its_first_view():
    whole, parted = stirred(TINY), build(TINY, chunk=3)
    parted.load_state_dict(whole.state_dict())
    pixels = torch.rand(5, 3, 16, 20)
    found = parted(pixels, scene_ids=torch.zeros(5))
    torch.testing.assert_close(
        found.tokens[3:], whole(pixels[[0, 3, 4]], scene_ids=torch.zeros(3)).tokens[1:], atol=1e-5, rtol=1e-5
    )


def test_gradients_reach_every_weight_and_recomputing_changes_none():
    check_gradients(stirred(TINY))
