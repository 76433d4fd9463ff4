"""How much do a model's heads keep of a step for its backward pass?"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mllm.heads.base import HeadParts
from mllm.heads.segmentation.head import LOSSES, SegmentationHead, SegmentationHeadConfig, raised
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.types import EncoderInfo


def kept_by_heads(model: MllmForConditionalGeneration, masks: int, size: int) -> int:
    """Bytes that segmentation heads keep of a micro-batch, of the other kinds next to nothing.

    Args:
        model: perhaps on the meta device.
        masks: how many are learned in a micro-batch.
        size: bytes of a number that the model computes with; losses of masks are in fp32.
    """
    kept = 0
    for head in model.heads.values():
        if isinstance(head, SegmentationHead):
            info = model.config.encoder_infos()[head.config.encoder]
            decoder, losses = _of_one_mask(head.config.model_dump_json(), info.model_dump_json())
            kept += masks * (decoder * size // 4 + losses)
    return kept


@lru_cache(maxsize=8)
def _of_one_mask(config: str, encoder: str) -> tuple[int, int]:
    """Bytes that the decoder of a head and its losses keep of one mask in fp32: they run, once, on zeros and random weights."""
    settings, info = SegmentationHeadConfig.model_validate_json(config), EncoderInfo.model_validate_json(encoder)
    head = SegmentationHead(settings, HeadParts(8, {settings.encoder: info}))
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no address comes twice
        return tensor

    def counted() -> int:
        return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)

    prompts = torch.zeros(1, settings.decoder.width, requires_grad=True)
    tokens = torch.zeros(1, info.grid[0] * info.grid[1], info.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, scores = head.decoder(prompts, tokens, torch.zeros(1, dtype=torch.long))
        decoder = counted()
        targets = torch.zeros(1, *head.target_sizes[0], dtype=torch.uint8)
        logits = raised(logits, head.target_sizes[0])
        for name in settings.weights:
            LOSSES[name](logits, targets, scores)
    return decoder, counted() - decoder
