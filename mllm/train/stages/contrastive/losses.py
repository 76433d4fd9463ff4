"""What does an image encoder learn from matching captions, near misses, and a teacher's ranking of them?

Shapes: B pairs of this process, W processes, K hard negative captions of an image, D width of the shared space. Every loss is
the sum over this process's rows, so that adding processes up and dividing by all pairs gives the loss of one process with all
rows; gathered features carry gradients back to the process they came from.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm import distributed

LossName = Literal["infonce", "sigmoid"]


class _Gather(torch.autograd.Function):
    """``(B, …)`` of every process → ``(W, B, …)``; the gradient of a process's part is the sum of what all processes ask."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[distributed.rank()]


def gather(tensor: Tensor) -> Tensor:
    """``(W, B, …)`` of equally large parts, with gradient."""
    return tensor[None] if distributed.world_size() == 1 else _Gather.apply(tensor)  # type: ignore[return-value]


def order_texts(blocks: Tensor) -> Tensor:
    """``(W, B, 1 + K, …)``, each image's caption before its negatives → ``(W · B · (1 + K), …)``: all captions, then all
    first negatives, and so on.

    The plain concatenation of the processes' blocks has a caption's column elsewhere than its image's row says; that was
    NegCLIP's error, which Vision4Chart (arXiv 2503.18435) corrects.
    """
    return blocks.movedim(2, 0).flatten(0, 2)


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    present: Tensor | None = None,
    kind: LossName = "infonce",
) -> Tensor:
    """Sum over this process's B pairs.

    images ``(B, D)`` and texts ``(B, 1 + K, D)`` are normalised; scale: the factor on similarities; present ``(B, 1 + K)``
    bool: False where an image has fewer negatives. infonce (CLIP, arXiv 2103.00020; negatives as in NegCLIP): the mean of
    image→text over captions and all negatives and text→image over the captions alone. sigmoid (SigLIP, arXiv 2303.15343):
    every image with every text, a hard negative being one more text that does not match; bias is added to the logits.
    """
    count = images.shape[0]
    blocks = gather(texts)
    every_text, every_image = order_texts(blocks), gather(images).flatten(0, 1)
    to_text = scale * images @ every_text.T
    hidden = None if present is None else ~order_texts(gather_flags(present))
    target = distributed.rank() * count + torch.arange(count, device=images.device)
    if kind == "sigmoid":
        logits = to_text if bias is None else to_text + bias
        signs = -torch.ones_like(logits)
        signs[torch.arange(count, device=images.device), target] = 1.0
        terms = F.logsigmoid(signs * logits)
        return -(terms if hidden is None else terms.masked_fill(hidden, 0.0)).sum()
    if hidden is not None:
        to_text = to_text.masked_fill(hidden, float("-inf"))
    to_image = scale * texts[:, 0] @ every_image.T
    return 0.5 * (
        F.cross_entropy(to_text, target, reduction="sum") + F.cross_entropy(to_image, target, reduction="sum")
    )


def gather_flags(flags: Tensor) -> Tensor:
    """`gather` for bool, without gradient."""
    if distributed.world_size() == 1:
        return flags[None]
    with torch.no_grad():
        return gather(flags.to(torch.uint8)).bool()


def ranking_loss(
    images: Tensor, texts: Tensor, scale: Tensor, teacher: Tensor, *, floor: float | None = None
) -> Tensor:
    """Contrastive partial ranking distillation (Chen et al., arXiv 2407.07479), the sum over this process's B images.

    teacher ``(B, K)``: a cross-encoder's scores of the image with its own hard negatives, NaN where there is none. Only
    their order is learned, not the scores: each negative is told apart from those of its image that the teacher ranks
    strictly lower and from the other images' captions. floor: negatives the teacher scores at or below it are easy and not
    put in order. Zero for images whose negatives have no order.
    """
    count, known = images.shape[0], ~teacher.isnan()
    own = scale * torch.einsum("bd,bkd->bk", images, texts[:, 1:])  # (B, K)
    captions = gather(texts[:, 0]).flatten(0, 1)  # (W · B, D)
    others = scale * images @ captions.T
    rows = torch.arange(count, device=images.device)
    mine = torch.zeros_like(others, dtype=torch.bool)
    mine[rows, distributed.rank() * count + rows] = True
    others = others.masked_fill(mine, float("-inf"))
    scores = teacher.nan_to_num(float("-inf"))
    lower = (scores[:, None, :] < scores[:, :, None]) & known[:, None, :]  # [b, j, k]: k is ranked below j
    anchors = known & lower.any(-1)
    if floor is not None:
        anchors &= scores > floor
    below = own[:, None, :].expand(-1, own.shape[1], -1).masked_fill(~lower, float("-inf"))
    easy = others[:, None, :].expand(-1, own.shape[1], -1)
    against = torch.cat([own[:, :, None], below, easy], dim=-1)
    each = against.logsumexp(-1) - own
    per_image = each.masked_fill(~anchors, 0.0).sum(-1) / anchors.sum(-1).clamp_min(1)
    return per_image.sum()
