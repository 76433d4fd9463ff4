"""How does a long video fit a short context: few fast tokens in the sequence, all slow ones read by gated cross-attention
(Slow-Fast, arXiv 2504.01328)?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.connectors.layers import attend, merge_heads


def fast_frames(count: int, stride: int, least: int) -> list[int]:
    """Every ``stride``-th of ``count`` frames, but at least ``least`` (all, where there are fewer)."""
    number = min(max(count // stride, least), count)
    return [int(k * count / number) for k in range(number)]


def fast_tokens(slow: Tensor, *, stride: int = 1, pool: int = 1, side: int = 1, least: int = 16) -> Tensor:
    """Slow tokens ``(T, n, C)`` of a video on a square grid → fast ones ``(T' * n / side², C)``, frame by frame.

    stride: frames are sampled; pool: then averaged in time, so many together (adaptively to ``least`` where fewer would remain);
    side: cells along each side averaged in space. Averages are taken in fp32.
    """
    kept = slow[torch.tensor(fast_frames(len(slow), stride, least), device=slow.device)]
    edge = round(kept.shape[1] ** 0.5)
    if edge**2 != kept.shape[1] or edge % side:
        raise ValueError(f"{kept.shape[1]} tokens of a frame are no square grid that {side} divides")
    volume = kept.float().transpose(1, 2).unflatten(2, (edge, edge))  # T C h w
    if pool > 1:
        frames = len(volume) // pool
        over_time = volume.permute(1, 2, 3, 0).flatten(0, 2)[:, None]
        if frames >= least:
            over_time = F.avg_pool1d(over_time, pool)
        else:
            over_time = F.adaptive_avg_pool1d(over_time, min(len(volume), least))
        volume = over_time[:, 0].unflatten(0, volume.shape[1:]).permute(3, 0, 1, 2)
    if side > 1:
        volume = F.avg_pool2d(volume, side)
    return volume.flatten(2).transpose(1, 2).flatten(0, 1).to(slow.dtype)


class SlowTokenAttention(nn.Module):
    """What a decoder layer adds to its self-attention so that text reads the slow tokens.

    The layer's own rotated queries ask; keys and values come from one projection whose rows are ordered (head, key | value,
    channel); a gate per token times one for the layer, which starts at zero, so that the language model starts unchanged.
    """

    def __init__(self, width: int, num_heads: int, num_key_value_heads: int):
        super().__init__()
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.head_width = width // num_heads
        self.key_value = nn.Linear(width, 2 * num_key_value_heads * self.head_width)
        self.token_gate = nn.Linear(width, 1)
        self.layer_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.layer_gate)

    def forward(self, state: Tensor, query: Tensor, slow: Tensor, *, asks: Tensor, valid: Tensor) -> Tensor:
        """state ``(B, T, L)``: the self-attention's output before its own projection; query ``(B, T, heads, d)``, rotated; slow
        ``(B, S, L)``, normed as the layer's input; asks ``(B, T)`` bool: positions that are text; valid ``(B, S)`` bool: slow tokens
        that are no padding → ``(B, T, L)``. A sample without slow tokens stays as it is."""
        batch, number = slow.shape[:2]
        pairs = self.key_value(slow).view(batch, number, self.num_key_value_heads, 2, self.head_width)
        often = self.num_heads // self.num_key_value_heads
        key, value = (part.transpose(1, 2).repeat_interleave(often, dim=1) for part in pairs.unbind(3))
        sees = valid.any(dim=1)
        mask = (valid | ~sees[:, None])[:, None, None, :]  # a row of nothing but padding would be NaN
        read = merge_heads(attend(query.transpose(1, 2), key, value, mask=mask))
        gate = torch.tanh(self.token_gate(state)) * torch.tanh(self.layer_gate)
        return state + gate * read * (asks & sees[:, None])[..., None].to(state.dtype)
