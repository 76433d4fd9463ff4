"""How do the language model's linear layers multiply in 8 bits, and how do they become plain again?

torchao's ``Float8Linear`` (tensorwise scaling) stands in for each linear layer of the decoder: inputs, weights and gradients
are cast to float8 with one scale a tensor as they are multiplied; the weights that are learned and saved stay what they
were. Norms, embeddings, the output head, the connector and the encoders are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mllm.errors import ConfigError, UnavailableError
from mllm.install import install_hint
from mllm.models.compilation import repeated_layers
from mllm.recipe import StageSpec
from mllm.train.engine.base import choose_engine

_MULTIPLE = 16
"""The float8 product takes widths that are multiples of this."""
_CAPABILITY = (8, 9)


def use_float8(model: nn.Module, stage: StageSpec, device: torch.device, *, zero_stage: int) -> Callable[[], None]:
    """Let the decoder's linear layers multiply in float8, in place; returns what undoes it.

    Parameters stay the same objects, so optimizers, state dicts and checkpoints do not notice. On a CPU the products are
    emulated (correct and slow, for tests).

    Raises `ConfigError` for a stage or a GPU that it does not fit, `UnavailableError` without torchao.
    """
    where = f"stages.{stage.name}.float8"
    _check(stage, device, where, zero_stage)
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise UnavailableError(f"{where} needs torchao; {install_hint('float8')}") from error
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None or not any(p.requires_grad for p in get_decoder().parameters()):
        raise ConfigError(f"{where}: no language model learns in this stage; leave float8 out")
    # The inner width of the weight gradient's product is the number of tokens, which need not be a multiple.
    config = Float8LinearConfig(emulate=device.type != "cuda", pad_inner_dim=True)
    replaced: list[tuple[nn.Module, str]] = []
    for layer in repeated_layers(get_decoder()):
        fitting = {name for parent, key, name in _linears(layer) if _fits(getattr(parent, key))}
        replaced += [(parent, key) for parent, key, name in _linears(layer) if name in fitting]
        convert_to_float8_training(layer, module_filter_fn=lambda _, name, f=fitting: name in f, config=config)
    if not replaced:
        raise ConfigError(f"{where}: no linear layer of the decoder has widths that are multiples of {_MULTIPLE}")

    def restore() -> None:
        for parent, key in replaced:
            setattr(parent, key, _plain(getattr(parent, key)))

    return restore


def _check(stage: StageSpec, device: torch.device, where: str, zero_stage: int) -> None:
    if stage.dtype != "bfloat16":
        raise ConfigError(f"{where} multiplies bf16 weights, and this stage trains in {stage.dtype}")
    if any(spec.lora is not None for part, spec in stage.learning().items() if part == "language_model"):
        raise ConfigError(
            f"{where}: adapters leave the large products frozen; float8 is for a language model that learns whole"
        )
    if choose_engine(stage).name == "fsdp2":
        raise ConfigError(
            f"{where}: fsdp2 gathers weights layer by layer; float8 goes with none, sharded, zero1 and zero2"
        )
    if zero_stage == 3:
        raise ConfigError(
            f"{where}: zero3 gathers weights layer by layer; float8 goes with none, sharded, zero1 and zero2"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{where}: {name} has no float8 products (compute capability 8.9 or newer); leave float8 out")


def _linears(layer: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, its attribute, name within the layer) of each linear layer below ``layer``."""
    for prefix, parent in layer.named_modules():
        for key, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, key, f"{prefix}.{key}" if prefix else key


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0


def _plain(linear: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain.train(linear.training)
