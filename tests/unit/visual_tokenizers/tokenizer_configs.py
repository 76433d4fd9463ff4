"""Which tiny tokenizers do the tests build?"""

from __future__ import annotations

from typing import Any

from mllm.visual_tokenizers import VISUAL_TOKENIZERS

CONV = {"channels": 16, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8}
VIT = {"type": "small_vit", "image_size": 16, "patch_size": 4, "width": 24, "depth": 1, "heads": 2}
HEAD = {"teacher_dim": 24, "width": 24, "depth": 1, "heads": 2}
SHARED = {"type": "vq", "size": 32, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True}
RESIDUAL = {"type": "residual", "size": 16, "dim": 8, "depth": 2}

TINY: dict[str, dict[str, Any]] = {
    name: VISUAL_TOKENIZERS.get(name).tiny() for name in ("vq", "tokenflow", "dualtoken", "illume")
}
