"""Which tensors do published weights give a model, and what do the adapters of its stages make of them?

Both are done as training does them: a stage reads what the one before it wrote, in its own dtype, puts 4-bit copies in the place of layers
where the recipe says so, and merges its adapter at the end. Adapters are multiplied in float64, so that the merged weights do not depend on
the order in which a machine's library adds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.config import validate
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.weights import default_dtype
from mllm.errors import CheckpointError
from mllm.models import lora
from mllm.models.text_part import decoder_of
from mllm.models.weight_files import present_name, published_renamings
from mllm.recipe import LanguageModelSpec, LoraSpec

DECODER, HEAD = "model.language_model.", "lm_head."
ENCODERS = "model.vision_tower.encoders."


@dataclass(frozen=True)
class Step:
    """What one stage did with the language model: opened it in a dtype, and merged an adapter where it learned one."""

    stage: str
    dtype: str
    lora: Mapping[str, Any] | None = None
    """How it learned, as in a recipe, with the adapted layers by name."""
    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by their names in the unmerged model."""


@dataclass(frozen=True)
class Made:
    """A published language model after every stage; tensors by their names in our checkpoints."""

    published: dict[str, Tensor]
    """As the first stage opened it."""
    tensors: dict[str, Tensor]
    tables: set[str]
    """Names of those with a row for every token."""


def after_stages(model: PreTrainedModel, spec: LanguageModelSpec, steps: Sequence[Step]) -> Made:
    """Do to a published language model what the stages did to it.

    Args:
        model: as `mllm.models.text_source.open_language_model` gives it, in the first stage's dtype; it is changed.
        spec: the recipe's ``model.language_model``.
        steps: the stages.

    Returns:
        Its tensors before and after; those before stay as they were.

    Raises:
        UnavailableError: the package peft, or bitsandbytes, is missing.
        CheckpointError: an adapter does not fit it.
    """
    inputs = model.get_input_embeddings()
    table = next(name for name, module in decoder_of(model).named_modules() if module is inputs)
    published = _tensors(model)
    tables = {f"{DECODER}{table}.weight", *(name for name in published if name.startswith(HEAD))}
    for step in steps:
        model.to(getattr(torch, step.dtype))
        if step.lora is not None:
            _merge(decoder_of(model), spec, step)
    return Made(published, _tensors(model), tables)


def _tensors(model: Any) -> dict[str, Tensor]:
    head = model.get_output_embeddings()
    named = {DECODER + name: tensor for name, tensor in decoder_of(model).state_dict().items()}
    return named | {HEAD + name: tensor for name, tensor in head.state_dict().items()}


def _merge(decoder: nn.Module, spec: LanguageModelSpec, step: Step) -> None:
    """Merge a stage's adapter. Merged layers get new tensors: who holds the former ones keeps them."""
    lora.inject(decoder, "language_model", list(decoder.named_children()), validate(LoraSpec, step.lora), skip=set())
    given = {name.removeprefix(DECODER): tensor.double() for name, tensor in step.adapter.items()}
    wanted = {name for name in decoder.state_dict() if lora.is_adapter(name)}
    if wanted != given.keys():
        raise CheckpointError(
            f"the adapter of stage {step.stage} does not fit {spec.source}: {sorted(wanted ^ given.keys())[:3]}"
        )
    decoder.load_state_dict(given, strict=False, assign=True)
    lora.merge(decoder)


def make_encoder(
    config: Mapping[str, Any], where: str, dtypes: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """What an encoder's published weights give it.

    Args:
        config: the encoder's, resolved, with ``weights``.
        where: its name, ``encoders.NAME``.
        dtypes: of the stages, one after another.
        names: of tensors in a checkpoint, below the encoder's prefix.

    Returns:
        Tensors by these names; those that it has none for are left out.

    Raises:
        UnavailableError: its source cannot be read.
        CheckpointError: its source lacks weights.
    """
    with default_dtype(getattr(torch, dtypes[0])):
        encoder = build_encoder(encoder_config(config, where=where))
    encoder.load_pretrained()
    for dtype in dtypes:
        encoder.to(getattr(torch, dtype))
    renamings, found = published_renamings(encoder), encoder.state_dict()
    present = {name: present_name(name, renamings) for name in names}
    return {name: found[own] for name, own in present.items() if own in found}


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes.

    Args:
        tensors: by name; their order does not matter.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
