"""Which tiny models that draw do the tests share?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllm.data.collate import collate
from mllm.processing.chat import encode_sample
from mllm.types import IMAGE_MARK, Sample, Turn, VisualCodes
from tests.helpers import tiny_model
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

PAIRS = [
    ("separate", "vq"),
    ("separate", "illume"),
    ("separate", "tokenflow"),
    ("vocabulary", "vq"),
    ("vocabulary", "dualtoken"),
    ("vocabulary", "tokenflow"),
    ("depth", "dualtoken"),
    ("depth", "illume"),
    ("next_scale", "tokenflow"),
]
"""Head and tokenizer."""
PROMPTS = ["Draw a seven, please", "One", "Hello, draw something of great beauty"]


def drawing_model(
    folder: Path, head: str, tokenizer: str = "vq", *, scale: float = 2.0, **changes: Any
) -> tuple[Any, Any]:
    """A model that reads and draws with one tiny tokenizer; weights are scaled so that contexts tell."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"width": 32, "heads": 2, "layers": 1} if head == "depth" else {}
    options = {
        "encoders": {"codes": {"type": "visual_tokenizer", "tokenizer": TINY[tokenizer]}},
        "connector": {"type": "mlp"},
        "visual_tokenizer": {"encoder": "codes"},
        "heads": {"draw": {"type": head, **settings, **changes.pop("head_options", {})}},
        **changes,
    }
    model, processor = tiny_model(folder, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "heads.draw" in name or "lm_head" in name or "language_model" in name:
                parameter.mul_(scale)
    return model, processor


def draw_sample(prompt: str, image: Any, **options: Any) -> Sample:
    """A request and the image that answers it."""
    return Sample("draw", [Turn("user", prompt), Turn("assistant", IMAGE_MARK, **options)], [image])


def read_sample(image: Any, answer: str = "seven") -> Sample:
    return Sample("read", [Turn("user", IMAGE_MARK + "Which?"), Turn("assistant", answer)], [image])


def batch(processor: Any, *samples: Sample, **options: Any) -> dict[str, torch.Tensor]:
    """Model inputs of several samples."""
    return collate([encode_sample(processor, sample) for sample in samples], pad_token_id=0, **options).inputs


def one(codes: VisualCodes, row: int) -> VisualCodes:
    """The codes of one image of several."""
    return VisualCodes({k: v[row : row + 1] for k, v in codes.codes.items()}, codes.grid, codes.scales)
