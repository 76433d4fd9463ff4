"""Are raw patches SOLO's, in raster order?"""

from __future__ import annotations

from pathlib import Path

import torch

from mllm.encoders.catalogue import build_encoder, encoder_config
from tests.golden.fill import load

GOLDEN = Path(__file__).parents[2] / "golden"


def test_a_patch_lists_channels_then_rows_then_columns():
    _, inputs, outputs = load(GOLDEN / "solo_patchify.json")
    config = encoder_config({"type": "raw_patches", "patch_size": 4, "image_size": [12, 16]}, where="encoder")
    features = build_encoder(config)(torch.from_numpy(inputs["input.image"])[None])
    want = torch.from_numpy(outputs["output.patches"]).reshape(1, 12, 48)
    assert features.grid == (3, 4) and torch.equal(features.tokens, want)
    assert list(build_encoder(config).parameters()) == []
