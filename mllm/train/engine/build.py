"""Which engine does a stage train with?"""

from __future__ import annotations

import torch
from torch import nn

from mllm import distributed
from mllm.recipe import StageSpec
from mllm.train.engine.base import Engine, choose_engine
from mllm.train.engine.groups import Group
from mllm.train.engine.sharded import ShardedEngine


def build_engine(model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device) -> Engine:
    """The engine a stage asks for. The model is on ``device`` and in the stage's dtype already."""
    choice = choose_engine(stage)
    if choice.name == "fsdp2" and distributed.world_size() > 1:
        from mllm.train.engine.fsdp2 import Fsdp2Engine  # torch.distributed.fsdp takes a second to import

        return Fsdp2Engine(model, groups, stage, device)
    if choice.zero_stage == 0:
        shared = choice.name == "sharded" and distributed.world_size() > 1  # one process has nothing to share
        return ShardedEngine(model, groups, stage, device) if shared else Engine(model, groups, stage, device)
    from mllm.train.engine.zero import ZeroEngine  # needs DeepSpeed

    return ZeroEngine(model, groups, stage, device, choice)
