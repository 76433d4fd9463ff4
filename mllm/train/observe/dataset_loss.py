"""Which of a mixture's datasets does the loss come from?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import distributed
from mllm.models.loss import IGNORE, hear_losses, shift_labels


class DatasetLoss:
    """Sums each dataset's loss over supervised tokens between two records, on the device: no step waits for it."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.device = list(names), device
        self._number = {name: k for k, name in enumerate(self.names)}
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=self.device)

    @contextmanager
    def of(self, batch: Any) -> Iterator[list[Any]]:
        """Around the forward pass of a batch; append its output to what is yielded when it holds logits."""
        outputs: list[Any] = []
        with hear_losses() as heard:
            yield outputs
        labels = batch.inputs["labels"]
        if "target_images" in batch.inputs:  # those are laid out anew, and their codes have losses of their own
            return
        if heard:
            rows, losses = heard[0]
        elif outputs and getattr(outputs[0], "logits", None) is not None:
            rows, losses = _from_logits(outputs[0].logits.detach(), labels, batch.inputs.get("position_ids"))
        else:
            return
        self._add(batch, rows, losses)

    def _add(self, batch: Any, rows: Tensor, losses: Tensor) -> None:
        owners = torch.zeros(batch.inputs["labels"].shape, dtype=torch.long)
        sample = 0
        for row, lengths in enumerate(batch.lengths):
            start = 0
            for length in lengths:
                owners[row, start : start + length] = self._number.get(batch.datasets[sample], 0)
                start, sample = start + length, sample + 1
        owner = owners.view(-1).to(self.device, non_blocking=True)[rows]
        values = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)])
        self.sums.index_add_(1, owner, values)

    def report(self) -> dict[str, dict[str, float]]:
        """``{"dataset_loss": {name: mean}}`` since the last record over all processes, without datasets that did not
        come; all processes must call it."""
        size = len(self.names)
        total = distributed.sum_numbers(self.sums.flatten().tolist())
        self.reset()
        means = {n: total[k] / total[size + k] for k, n in enumerate(self.names) if total[size + k]}
        return {"dataset_loss": means} if means else {}


def _from_logits(logits: Tensor, labels: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places in the flattened ``(B, T)`` and their losses, some rows of logits at a time."""
    targets = shift_labels(labels, position_ids).reshape(-1).to(logits.device)
    rows = targets.ne(IGNORE).nonzero(as_tuple=True)[0]
    flat = logits.reshape(-1, logits.shape[-1])
    parts = [F.cross_entropy(flat[part].float(), targets[part], reduction="none") for part in rows.split(512)]
    return rows, torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float32)
