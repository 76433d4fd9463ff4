"""Which model does a stage start from, and on which device is it built?"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mllm import distributed
from mllm.errors import CheckpointError
from mllm.progress import phase
from mllm.recipe import Recipe, StageSpec
from mllm.train.prepare import DTYPES


def start_device(recipe: Recipe) -> torch.device:
    """Where models are built and weights are read to: this process's GPU. The CPU where 4-bit copies take the place of
    layers, whose whole weights need not fit the GPU."""
    for stage in recipe.stages:
        for spec in stage.learning().values():
            if spec.lora is not None and spec.lora.bits is not None:
                return torch.device("cpu")
    return distributed.local_device()


def start_model(
    recipe: Recipe,
    stage: StageSpec,
    previous: Path | None,
    *,
    device: torch.device | None = None,
    in_shares: bool = False,
) -> tuple[Any, Any]:
    """The model a stage starts from, on ``device`` (default: `start_device`): the previous stage's, else the recipe's with
    published weights. Parts without weights depend on the recipe's seed and the kind of device alone and are equal on all
    processes. in_shares: nothing runs before the engine but encoders, so under ZeRO-3 each process keeps only its share of the language
    model's weights, and never has more (`mllm.train.engine.cut`)."""
    with phase("importing the model's classes"):
        from mllm.models.build import build_model, num_bytes, placed_on
        from mllm.models.modeling_mllm import MllmForConditionalGeneration
        from mllm.processing.processor import MllmProcessor
        from mllm.train.engine.base import choose_engine
        from mllm.train.engine.cut import can_be_cut, language_model_in_shares, language_model_on_host

    dtype = DTYPES[stage.dtype]
    device = device or start_device(recipe)
    cut = in_shares and can_be_cut(recipe.model, stage, published=previous is None)
    # Under fsdp2 its layers go to the GPU one by one, when they are shared (`mllm.train.engine.fsdp2`).
    waits = in_shares and choose_engine(stage).name == "fsdp2" and distributed.world_size() > 1
    keeping = language_model_in_shares(stage, device) if cut else language_model_on_host() if waits else nullcontext()
    if previous is None:
        torch.manual_seed(recipe.seed)
        with keeping:
            return build_model(recipe.model, dtype=dtype, device=device)
    try:
        with phase(f"reading weights of {previous}") as reading, keeping:
            place = placed_on(
                torch.device("cpu") if cut or waits else device
            )  # cut there, only the share goes to the device
            model = MllmForConditionalGeneration.from_pretrained(str(previous), dtype=dtype, **place)
            if not waits:
                model.to(device)
            reading.num_bytes = num_bytes(model)
        return model, MllmProcessor.from_pretrained(str(previous))
    except OSError as error:
        raise CheckpointError(f"{previous}: the previous stage cannot be read ({error})") from error
