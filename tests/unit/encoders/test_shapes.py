"""Does a pass of shapes alone find the shapes and the operations of a real one, and compute nothing of what has values?"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.library import LibraryEncoder
from mllm.encoders.shapes import OnlyShapes
from mllm.testing.encoders import resolve_example, sample_pixels


def _pass(name: str, mode):
    config = resolve_example(name)
    with torch.device("meta"), mode:
        encoder = build_encoder(config).eval()
    pixels = sample_pixels(config, 2).to("meta")
    with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
        features = encoder(pixels)
    return features.tokens.shape, features.tokens.dtype, features.grid, counter.get_total_flops()


@pytest.mark.parametrize("name", ["timm", "hf", "ppocr", "vssd", "biformer"])
def test_shapes_types_and_operations_are_those_of_a_whole_pass(name):
    assert _pass(name, OnlyShapes()) == _pass(name, nullcontext())


def test_what_has_values_is_computed_and_a_meta_tensor_is_handed_back():
    norm, values = nn.LayerNorm(4), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    wanted = norm(values)
    with OnlyShapes():
        assert norm(values).equal(wanted) and torch.zeros(3).fill_(2.0).sum() == 6
        meta = torch.empty(2, 4, device="meta")
        assert norm.to("meta")(meta) is meta and nn.init.normal_(meta) is meta and nn.Linear(4, 3).weight.std() > 0


def test_a_config_is_measured_once(monkeypatch):
    spec = {**spec_of_a_tiny_transformer(), "image_size": 24}
    runs = []
    measure = LibraryEncoder._measure.__func__
    monkeypatch.setattr(LibraryEncoder, "_measure", classmethod(lambda *a: runs.append(a) or measure(*a)))
    first, second = (encoder_config(dict(spec), where="e") for _ in range(2))
    other = encoder_config({**spec, "image_size": 32}, where="e")
    assert first == second and first.info is not None and other.info.grid != first.info.grid
    assert len(runs) <= 2 and first.info.grid == (6, 6)


def spec_of_a_tiny_transformer():
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    return {"type": "timm", "architecture": "vit_small_patch16_dinov3", "options": options, "layers": [-1]}
