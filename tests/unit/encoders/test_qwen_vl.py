"""Are Qwen-VL's vision towers those of transformers, at any size of a picture?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError
from mllm.processing.layout import LayoutRules
from mllm.processing.views.base import views_config
from mllm.processing.views.pixels import to_view_pixels
from mllm.types import ViewLayout
from tests.helpers import picture

WINDOWS = {
    "model_type": "qwen2_5_vl_vision", "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
    "out_hidden_size": 24, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2],
}  # fmt: skip
TOWERS: dict[str, Any] = {
    "windows": (Qwen2_5_VisionTransformerPretrainedModel, WINDOWS),
    "other windows": (
        Qwen2_5_VisionTransformerPretrainedModel,
        {**WINDOWS, "window_size": 32, "num_heads": 4, "fullatt_block_indexes": [0, 3], "out_hidden_size": 40},
    ),
    "no windows": (
        Qwen2VisionTransformerPretrainedModel,
        {"model_type": "qwen2_vl_vision", "depth": 3, "embed_dim": 32, "hidden_size": 24, "num_heads": 2, "patch_size": 4},
    ),
}  # fmt: skip
SIZES = [
    (8, 8), (16, 16), (24, 40), (40, 24), (7, 90), (90, 7), (64, 64), (65, 33), (33, 65), (12, 130), (130, 12), (100, 100),
    (31, 47), (47, 31), (9, 60), (60, 9), (80, 20), (200, 150), (150, 201), (55, 8),
]  # fmt: skip
"""width × height"""


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_tokens_at_twenty_sizes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """From a whole checkpoint's file to the tokens, their own image processor beside our views."""
    tower, architecture = TOWERS[name]
    torch.manual_seed(0)
    theirs = tower(AutoConfig.for_model(**architecture)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state = {f"visual.{key}": value.contiguous() for key, value in theirs.state_dict().items()}
    save_file({**state, "model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    spec = {"type": "qwen_vl", "architecture": architecture, "weights": {"source": str(tmp_path / "model.safetensors")}}
    encoder = build_encoder(encoder_config(spec, where="encoder")).eval()
    encoder.load_pretrained()
    image = encoder.config.info.image
    least, most = 4, 40
    rules = LayoutRules(
        ViewLayout(num_tokens=1, grid=(1, 1), cell=1),
        {"vision": image},
        views_config({"type": "native", "rule": "qwen", "min_patches": least, "max_patches": most}),
    )
    reader = Qwen2VLImageProcessorPil(min_pixels=least * 64, max_pixels=most * 64, patch_size=4, merge_size=2)
    pictures = [picture(k, size=size) for k, size in enumerate(SIZES)]
    given = reader(pictures, return_tensors="pt")
    want = theirs(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    layouts = [rules.layout((image.height, image.width)) for image in pictures]
    grids = [layout.patches for layout in layouts]
    assert [(1, 2 * rows, 2 * columns) for rows, columns in grids] == [
        tuple(g) for g in given["image_grid_thw"].tolist()
    ]
    patches = torch.cat(
        [to_view_pixels(p, {"vision": image}, rules.view_boxes((p.height, p.width)))["vision"] for p in pictures]
    )
    have = encoder(patches, grids=grids)
    assert have.grids == tuple(grids)
    torch.testing.assert_close(have.tokens[0], want, atol=1e-5, rtol=1e-5)
    last = grids[-1][0] * grids[-1][1]
    alone = encoder(patches[-last:], grids=grids[-1:]).tokens[0]
    torch.testing.assert_close(alone, want[-last:], atol=1e-5, rtol=1e-5)


def test_what_the_tower_cannot_honour_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"architecture": {"model_type": "clip_vision_model"}}, "no tower of qwen2_5_vl_vision"),
        ({"layers": [-2]}, "layers stays"),
        ({"image_size": 30}, "no multiple of 8"),
        ({"architecture": None}, "give an HF config"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoder_config({"type": "qwen_vl", "architecture": WINDOWS, **changes}, where="encoder")
    save_file({"visual.patch_embed.proj.weight": torch.ones(32, 3, 2, 4, 4)}, tmp_path / "w.safetensors")
    spec = {"type": "qwen_vl", "architecture": WINDOWS, "weights": {"source": str(tmp_path / "w.safetensors")}}
    with pytest.raises(CheckpointError, match="missing"):
        build_encoder(encoder_config(spec, where="encoder")).load_pretrained()
