"""How do processes that split a batch keep step with those that did not?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mllm import distributed
from mllm.data.collate import Batch
from mllm.heads.base import TARGET
from mllm.processing.chat import IGNORE
from mllm.train.engine.base import Engine


def level(engine: Engine, micro: Sequence[Batch]) -> list[Batch]:
    """A step's micro-batches, and behind them, where other processes have more, some of which nothing is learned: ZeRO-2, ZeRO-3 and fsdp2
    exchange gradients or weights in every pass, so a process with fewer passes would leave the others waiting. Every process must
    call it."""
    if engine.stage.max_tokens_per_batch is None or not (engine.zero_stage >= 2 or engine.shares_weights):
        return list(micro)
    missing = round(distributed.largest_number(len(micro))) - len(micro)
    return [*micro, *[_mute(min(micro, key=_slots))] * missing]


def _slots(batch: Batch) -> int:
    return batch.inputs["input_ids"].numel()


def _mute(batch: Batch) -> Batch:
    labels = torch.full_like(batch.inputs["labels"], IGNORE)
    drawn = TARGET + "images"  # what the text's own places stand for
    inputs = {key: value for key, value in batch.inputs.items() if key == drawn or not key.startswith(TARGET)}
    return replace(batch, inputs={**inputs, "labels": labels}, num_supervised=0)
