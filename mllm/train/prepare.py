"""What is done to a model before a stage trains it: device, dtype, attention, checkpointing, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mllm import distributed
from mllm.errors import ConfigError, UnavailableError
from mllm.models.compilation import compile_layers, tell_uncompiled
from mllm.progress import tell
from mllm.recipe import StageSpec
from mllm.train import attention, flash
from mllm.train.engine.base import choose_engine
from mllm.train.engine.trainable import StageModel
from mllm.train.sight import check_sight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mllm.train.engine.trainable import StageConfig, TrainableModel


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def give_dtype(model: nn.Module | TrainableModel, dtype: torch.dtype) -> None:
    """Give a model's parameters this dtype, in place; quantised ones keep theirs. Buffers keep theirs too (rotary tables in bf16 place
    distant tokens wrongly), but for batch norms, whose kernels want one type."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.to(dtype)


def give_frozen_dtype(model: nn.Module | TrainableModel, dtype: torch.dtype) -> None:
    """The same for what a model that learns in float32, under autocast, does not learn. Batch norms stay in float32 as a whole: autocast
    hands them pictures of either type, and their kernels take bf16 pictures with float32 statistics but not the reverse."""
    norms = {id(p) for module in model.modules() if isinstance(module, BATCH_NORMS) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad and id(parameter) not in norms:
            parameter.data = parameter.data.to(dtype)


def prepare_model(model: TrainableModel, stage: StageSpec, *, device: torch.device, zero_stage: int) -> str:
    """Bring a model into the state a stage trains it in, in place; returns the attention implementation of its language
    model."""
    dtype = DTYPES[stage.dtype]
    give_dtype(model, dtype)
    model.config.dtype = dtype
    if choose_engine(stage).name == "fsdp2" and distributed.world_size() > 1:
        from mllm.train.engine.fsdp2 import share_layers  # torch.distributed.fsdp takes a second to import

        share_layers(model, stage.name, device)
    else:
        model.to(device)  # pyright: ignore[reportArgumentType]
    text = model.config.get_text_config()
    chosen = _choose_attention(model, text, stage, device)
    flash.release()
    if stage.attention == "auto":
        tell(f"{stage.name}: {_adopted(model, text, dtype, device)}")
    if stage.gradient_checkpointing:
        enable_checkpointing(model)
    if stage.compiles_here:
        if zero_stage == 3:
            raise ConfigError(
                f"stages.{stage.name}.compile: compiled layers and zero3 do not work together; use fsdp2, or sharded"
            )

        def say(line: str) -> None:
            tell(f"! {stage.name}: {line}")

        if isinstance(model, StageModel):
            model.compile_networks()
        else:
            shares = choose_engine(stage).shares_weights
            compile_layers(model, fixed_length=stage.packing, hooks_outside=shares, tell=say)
        tell_uncompiled(say)
    return chosen


def _choose_attention(model: TrainableModel, text: Any, stage: StageSpec, device: torch.device) -> str:
    """Give the language model the attention that the stage asks for; where it leaves the choice, the first with which a token sees what it
    should (`check_sight`)."""
    left = stage.attention in (None, "auto")
    default = default_attention(text, stage, device) if left else cast("str", stage.attention)
    names = list(dict.fromkeys([default, "sdpa", "eager"])) if left else [default]
    refused: list[Exception] = []
    for chosen in names:
        _check_packing(stage, chosen)
        if chosen == attention.NAME:
            attention.register()
        try:
            model.set_attn_implementation({"text_config": chosen})
            if not isinstance(model, StageModel):
                where = f"stages.{stage.name}"
                check_sight(model, chosen, packing=stage.packing, where=where, inputs=attention_inputs)
            if refused:
                tell(f"! {stage.name}: attention by {chosen}: {refused[0]}")
            return chosen
        except torch.OutOfMemoryError:
            raise
        except (ConfigError, UnavailableError, ValueError, RuntimeError) as error:  # of a class that is not made for it
            refused.append(error)
    raise refused[-1]


def _adopted(model: TrainableModel, text: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Let the best attention kernel that is installed run, and say which does."""
    if dtype != torch.bfloat16 or not hasattr(text, "num_attention_heads"):
        return "attention runs by torch: kernels in packages are for a language model in bfloat16"
    return flash.adopt(model, text, device)[1]


def default_attention(config: PreTrainedConfig | StageConfig, stage: StageSpec, device: torch.device) -> str:
    """Packed rows: variable-length attention (flex on CUDA where scores are capped, which the kernel lacks). Padded
    rows: the same on CUDA, where right padding then needs no mask; SDPA otherwise and for models that are not plain
    transformers."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    plain = not any(
        kind not in ("full_attention", "sliding_attention") for kind in getattr(config, "layer_types", None) or []
    )
    if stage.packing:
        if not plain:
            raise ConfigError(
                f"stages.{stage.name}.packing: {config.model_type} mixes attention with layers that carry state from "
                "one packed sample to the next; use group_by_length instead"
            )
        return "flex_attention" if capped and device.type == "cuda" else attention.NAME
    return attention.NAME if device.type == "cuda" and plain and not capped else "sdpa"


def _check_packing(stage: StageSpec, chosen: str) -> None:
    known = (attention.NAME, "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
    if stage.packing and chosen not in known:
        raise ConfigError(
            f"stages.{stage.name}.attention: {chosen!r} cannot keep packed samples apart; use one of {', '.join(known)}"
        )


def attention_inputs(batch: Any, implementation: str) -> dict[str, Any]:
    """What a batch's model inputs need for this attention. Packed: positions and boundaries, never a mask (transformers
    recognises packing only without one and without a cache)."""
    inputs = dict(batch.inputs)
    packed = batch.cu_seq_lens is not None
    if packed or implementation == attention.NAME:
        inputs.pop("attention_mask", None)
    if packed and (implementation == attention.NAME or implementation.startswith("flash_attention")):
        longest = max(length for row in batch.lengths for length in row)
        length = attention.bucket(longest, batch.inputs["input_ids"].shape[1])
        inputs |= {
            "cu_seq_lens_q": batch.cu_seq_lens,
            "cu_seq_lens_k": batch.cu_seq_lens,
            "max_length_q": length,
            "max_length_k": length,
        }
    inputs["use_cache"] = False
    return inputs


def enable_checkpointing(model: TrainableModel) -> None:
    """Recompute layers in the backward pass, also in frozen parts that gradients pass through."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # transformers looks at the layer's own mode; its (frozen) children stay in evaluation mode.
            module.training = True
