"""How is the language-model loss computed without ever holding all logits?

The head is applied to supervised positions only, a chunk of rows at a time; each chunk's softmax gradient is formed in
place in fp32 and multiplied out at once, so the backward pass needs no logits. Memory is a few ``(chunk, V)`` buffers
instead of ``(T, V)`` ones. The idea of fusing head and loss is that of Liger-Kernel (Hsu et al., arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
DEFAULT_CHUNK = 4096
CPU_CHUNK = 512
_heard: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("heard", default=None)


@contextmanager
def hear_losses() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block, every `linear_cross_entropy` appends to what is yielded: the places in its flattened ``(B, T)``
    that are supervised, and each one's loss (fp32, without gradient)."""
    heard: list[tuple[Tensor, Tensor]] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def shift_labels(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """labels ``(B, T)`` → the target of every position ``(B, T)``: its successor's label. The last position has none,
    and with ``position_ids`` ``(B, T)`` (packed rows, restarting at 0; of several axes the first of ``(4, B, T)``) neither has the last
    token of any packed sample."""
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    if position_ids is not None and position_ids.ndim == 3:
        position_ids = position_ids[0] if len(position_ids) == 4 else None
    if position_ids is not None:
        starts = F.pad(position_ids.eq(0), (0, 1), value=False)[:, 1:]
        shifted = shifted.masked_fill(starts, IGNORE)
    return shifted


def without_placeholders(
    labels: Tensor, placeholder: int | None, num_items: Tensor | float | None
) -> tuple[Tensor, Tensor | float | None]:
    """labels ``(B, T)`` in which placeholders of images carry no loss, and the step's count of labels to match.

    Other trainers' collators copy ``input_ids``, and their count of the whole step holds placeholders too. Seen from here
    is this batch alone: it gets the part of the count that its own share of words is, so that batches weigh as that trainer
    meant them to and the loss is a mean over words.
    """
    if placeholder is None:
        return labels, num_items
    words = labels.masked_fill(labels == placeholder, IGNORE)
    if num_items is not None:
        counted, kept = ((x[:, 1:] != IGNORE).sum() for x in (labels, words))
        share = torch.where(kept > 0, kept / counted.clamp(min=1), 1.0)
        num_items = num_items * share.to(num_items.device if isinstance(num_items, Tensor) else share.device)
    return words, num_items


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    position_ids: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    shift: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of ``softcap(scale · (hidden @ weight.T + bias))`` against the next token.

    hidden ``(B, T, L)``, weight ``(V, L)``, labels ``(B, T)`` with -100 where nothing is learned. num_items_in_batch:
    the loss is the sum divided by it (supervised tokens of the whole optimizer step, all ranks); None: by this batch's
    own count. shift: labels are those of the position itself (HF's convention) and are shifted here. Without any
    supervised position the loss is 0 and still reaches every input, so that all ranks run the same backward. Returns an
    fp32 scalar.
    """
    if shift:
        labels = shift_labels(labels, position_ids)
    labels = labels.reshape(-1).to(hidden.device)
    rows = labels.ne(IGNORE).nonzero(as_tuple=True)[0]
    count = len(rows)
    if count == 0:
        zero = hidden.float().sum() * 0.0 + weight.float().sum() * 0.0
        return zero if bias is None else zero + bias.float().sum() * 0.0
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    labels = labels.index_select(0, rows)
    if chunk_size is None:
        chunk_size = DEFAULT_CHUNK if hidden.is_cuda else CPU_CHUNK
    heard = _heard.get()
    each = None if heard is None else torch.empty(count, dtype=torch.float32, device=hidden.device)
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, softcap, chunk_size, each)  # type: ignore[assignment]
    if heard is not None and each is not None:
        heard.append((rows, each))
    return total / (count if num_items_in_batch is None else num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy; gradients are computed chunk by chunk in the forward pass and scaled in the backward
    pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        chunk_size: int,
        each: Tensor | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        learns = need_hidden or need_weight or need_bias
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # fp32: bf16 sums over many chunks lose the small terms.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            part, target = hidden[rows], labels[rows]
            logits = _matmul_fp32(part, weight.t())
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            slope = logits.div(softcap).square_().neg_().add_(1.0) if softcap is not None and learns else None
            normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            chosen = logits.gather(1, target[:, None])
            losses = normaliser - chosen
            total += losses.sum()
            if each is not None:
                each[rows] = losses[:, 0]
            if not learns:
                continue
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, target[:, None], torch.full_like(chosen, -1.0))
            if slope is not None:
                grad *= slope
            if scale != 1.0:
                grad *= scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), part)
                else:
                    grad_weight += _matmul_fp32(grad.t(), part)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (upstream,) = grad_outputs
        # The saved gradients are this call's own buffers: scaling them in place saves a (V, L) copy.
        scaled = [None if grad is None else grad.mul_(upstream.to(grad.dtype)) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with an fp32 result whatever the inputs' type; on CUDA without a rounded intermediate."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()
