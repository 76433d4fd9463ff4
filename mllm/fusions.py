"""How do maps of one picture, a transformer's and those of convolutions, become one (DB-SAM, arXiv 2410.04172)?"""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn


def _scorer(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, inner, bias=False), nn.SiLU(), nn.LayerNorm(inner), nn.Linear(inner, width, bias=False)
    )


class _Fusion(nn.Module):
    """What both fusions end with: a pre-norm MLP beside the sum."""

    def __init__(self, width: int, expand: float):
        super().__init__()
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, int(width * expand)), nn.Linear(int(width * expand), width)

    def think(self, joined: Tensor) -> Tensor:
        return joined + self.fc2(nn.functional.gelu(self.fc1(self.ffn_norm(joined))))


class SoftmaxFusion(_Fusion):
    """Branches ``(…, C)`` compete at every position and channel; the ViT stands last."""

    def __init__(self, width: int, branches: int, reduction: int, expand: float):
        super().__init__(width, expand)
        self.vit_scorer = _scorer(width, width // reduction)
        self.conv_scorers = nn.ModuleList(_scorer(width, width // reduction) for _ in range(branches))

    def forward(self, vit: Tensor, convs: list[Tensor]) -> Tensor:
        scores = [scorer(conv) for scorer, conv in zip(self.conv_scorers, convs)] + [self.vit_scorer(vit)]
        shares = torch.stack(scores).float().softmax(0).to(vit.dtype)
        return self.think((shares * torch.stack([*convs, vit])).sum(0))


class GateFusion(_Fusion):
    """vit, conv ``(B, …, C)``: a share by what the convolutions see at a position and what the ViT sees of the whole."""

    def __init__(self, width: int, reduction: int, expand: float):
        super().__init__(width, expand)
        self.spatial = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1, bias=False))
        self.channel = _scorer(width, width // reduction)

    def forward(self, vit: Tensor, convs: list[Tensor]) -> Tensor:
        (conv,) = convs
        whole = vit.flatten(1, -2).mean(1)
        channel = self.channel(whole).view(len(vit), *[1] * (vit.dim() - 2), -1)
        share = (self.spatial(conv) + channel).sigmoid()
        return self.think(conv * share + vit * (1 - share))


class ChannelAttentionConv(nn.Module):
    """DB-SAM's block of a depthwise convolution and a squeeze-excite beside a map ``(B, C, rows, cols)``."""

    def __init__(self, width: int):
        super().__init__()
        self.pre_norm = LayerNorm2d(width, eps=1e-6)
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.se = SEModule(width, rd_divisor=8, bias=False, act_layer=nn.GELU)
        self.conv_pw = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_pw(self.se(nn.functional.gelu(self.conv_dw(self.pre_norm(x)))))
