"""How do codes become the visual input of a language model? As an encoder's features, for any connector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.types import EncoderInfo, Grid, VisionFeatures, VisualCodes
from mllm.visual_tokenizers.base import VisualTokenizer


def feature_grid(tokenizer: VisualTokenizer) -> Grid:
    """The finest of the codebooks' grids."""
    return max(tokenizer.grids.values(), key=lambda grid: grid[0] * grid[1])


def feature_info(tokenizer: VisualTokenizer) -> EncoderInfo:
    """Sizes of `code_features`, as a connector wants them: N positions, the codebooks' channels side by side."""
    return EncoderInfo(image=tokenizer.image, grid=feature_grid(tokenizer), width=sum(tokenizer.embed_dims.values()))


def code_features(tokenizer: VisualTokenizer, codes: VisualCodes) -> VisionFeatures:
    """Codes → ``(B, N, sum of D)``: each codebook's vectors, summed over depth or scales, side by side on channels.

    A codebook on a coarser grid is resized (nearest) to the finest one, so that no vectors are mixed. The sequence
    stays N long whatever the number of codebooks (DualToken, section 3.3 of its paper; TokenFlow's 40 channels).
    """
    return join_parts(tokenizer, tokenizer.embed(codes))


def join_parts(tokenizer: VisualTokenizer, vectors: Mapping[str, Tensor]) -> VisionFeatures:
    """Vectors by codebook, or by part of a shared one, ``(B, n, D)`` each → ``(B, N, sum of D)`` on the finest grid."""
    grid = feature_grid(tokenizer)
    parts = [_on_grid(part, tokenizer.grids.get(name, tokenizer.grid), grid) for name, part in vectors.items()]
    return VisionFeatures(tokens=torch.cat(parts, -1), grid=grid)


def _on_grid(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    if tuple(old) == tuple(new):
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, old)
    return F.interpolate(maps, size=new, mode="nearest-exact").flatten(2).transpose(1, 2)
