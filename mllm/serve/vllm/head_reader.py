"""How do heads come by the states that vLLM wrote an answer with? A logits processor knows which row of a step is whose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mllm.serve.heads import KEY
from mllm.serve.vllm.served_heads import HeadsInEngine, Written


class HeadReader(LogitsProcessor):
    """Tells `HeadsInEngine` of every step of the answers whose request has a name for it; changes no logits."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Written] = {}

    def is_argmax_invariant(self) -> bool:
        """It must see greedy answers too, which vLLM hides from processors that do not change them."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        heads = HeadsInEngine.current
        for index in batch_update.removed:
            if (row := self.rows.pop(index, None)) is not None:
                row.keep_its_own()
        for index, params, _, output in batch_update.added:
            self.rows.pop(index, None)
            key = (getattr(params, "extra_args", None) or {}).get(KEY)
            if key is not None and heads is not None:
                self.rows[index] = heads.begin(str(key), output)
        for first, second, direction in batch_update.moved:
            one, other = self.rows.pop(first, None), self.rows.pop(second, None)
            if one is not None:
                self.rows[second] = one
            if other is not None and direction == MoveDirectionality.SWAP:
                self.rows[first] = other

    def apply(self, logits: Tensor) -> Tensor:
        """logits ``(R, V)`` of all rows of a step."""
        heads = HeadsInEngine.current
        if heads is not None and heads.hidden is not None and len(heads.hidden) == len(logits):
            for index, row in self.rows.items():
                heads.read(row, index)
        return logits
