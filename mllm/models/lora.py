"""How do low-rank adapters get onto one part of the model, and off again, merged?

LoRA (Hu et al., arXiv 2106.09685), DoRA (Liu et al., arXiv 2402.09353) and rank-stabilised LoRA (Kalajdzievski, arXiv
2312.03732) by the PEFT library, injected in place so that parts keep their names; QLoRA (Dettmers et al., arXiv 2305.14314)
with bitsandbytes' 4-bit layers below. Training puts them on and merges them; saving trained parts alone merges them into a published
language model once more (`mllm.models.trained_parts`), so it stands below both.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from mllm.errors import ConfigError, UnavailableError, did_you_mean
from mllm.install import install_hint, package_hint
from mllm.recipe import LoraSpec

_ROWS = ".trainable_tokens_delta."


def inject(
    model: nn.Module,
    part: str,
    modules: list[tuple[str, nn.Module]],
    spec: LoraSpec,
    *,
    skip: set[int],
    rows: dict[str, list[int]] | None = None,
) -> list[str]:
    """Put adapters on the linear layers of one part, in place; returns the adapted modules' names.

    modules: (name inside ``model``, module) of the part; skip: ids of modules that get none (the output head); rows: name of
    an embedding or head → its rows that learn beside the adapter. Every part has its own adapter,
    named after it. Raises `ConfigError` when ``target`` matches nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UnavailableError(f"learn.{part}.lora needs the peft package: {install_hint('train')}") from None
    linear = {
        f"{prefix}.{name}" if name else prefix: module
        for prefix, root in modules
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in skip
    }
    if spec.target == "all-linear":
        chosen = list(linear)
    else:
        chosen = [n for n in linear if any(n == t or n.endswith("." + t) for t in spec.target)]
        for target in spec.target:
            if not any(n == target or n.endswith("." + target) for n in linear):
                last = sorted({n.rpartition(".")[2] for n in linear})
                raise ConfigError(
                    f"learn.{part}.lora.target: no linear layer is called {target!r}{did_you_mean(target, last)}. "
                    f"Known: {', '.join(last)}"
                )
    if not chosen:
        raise ConfigError(f"learn.{part}.lora: this part has no linear layer to adapt")
    if spec.bits is not None:
        if part != "language_model" and not part.startswith("encoders."):
            raise ConfigError(
                f"learn.{part}.lora.bits: only language_model and encoders are worth 4 bits; leave it out"
            )
        if spec.use_dora:
            raise ConfigError(
                f"learn.{part}.lora: bits and use_dora exclude each other (DoRA needs the weights' norms); keep one"
            )
        for name in chosen:
            _quantize(model, name, part)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.r,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=chosen,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        bias="none",
        trainable_token_indices=rows or None,
    )
    inject_adapter_in_model(config, model, adapter_name=adapter_name(part))
    activate_all(model)
    return chosen


def activate_all(model: nn.Module) -> None:
    """Switch every part's adapter on: PEFT leaves on only the one that was put in last, in all layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.set_adapter(sorted(module.token_adapter.trainable_tokens_delta))
        elif isinstance(module, BaseTunerLayer):
            module.set_adapter(sorted({key for name in module.adapter_layer_names for key in getattr(module, name)}))


def _quantize(model: nn.Module, name: str, part: str) -> None:
    """Put a 4-bit copy of a linear layer in its place; on the meta device (a plan) nothing."""
    try:
        bnb: Any = importlib.import_module("bitsandbytes")
    except ImportError:
        raise UnavailableError(
            f"learn.{part}.lora.bits needs the bitsandbytes package: {package_hint('bitsandbytes')}, or leave bits out"
        ) from None
    old: Any = model.get_submodule(name)
    if old.weight.is_meta:
        return
    new: Any = bnb.nn.Linear4bit(
        old.in_features,
        old.out_features,
        old.bias is not None,
        compute_dtype=old.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(old.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=new)
    new.bias = old.bias
    new.support_avx512bf16_for_cpu = (
        False  # its repacking at the first evaluation fails for widths that are no multiple of 64
    )
    new.to(old.weight.device)
    _replace(model, name, new)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _dequantized(layer: Any) -> nn.Linear | None:
    """A 4-bit layer as a plain one, None for a layer that is plain already."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None:
        return None
    bnb: Any = importlib.import_module("bitsandbytes")

    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight = bnb.functional.dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype)
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def adapter_name(part: str) -> str:
    """The PEFT adapter's name of a part (dots are not allowed in it)."""
    return part.replace(".", "_")


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter belongs to an adapter (LoRA matrices, DoRA magnitudes, rows of added tokens) and not to the base
    model."""
    return ".lora_" in parameter_name or _ROWS in parameter_name


def has_adapters(model: nn.Module) -> bool:
    return any(is_adapter(name) for name, _ in model.named_parameters())


def merge(model: nn.Module) -> int:
    """Fold every adapter into its base layer and remove it, in place; parameter names are the original ones again.

    Returns how many layers were merged, tables with learned rows included. Raises `ValueError` from PEFT when a merge would produce NaN.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import TrainableTokensWrapper
    except ImportError:
        return 0
    tables = [(n, m) for n, m in model.named_modules() if isinstance(m, TrainableTokensWrapper)]
    for name, wrapper in tables:
        whole = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        _replace(model, name, whole)
    merged = len(tables)
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in wrapped:
        tuner: Any = layer
        base = tuner.get_base_layer()
        plain = _dequantized(base)
        if plain is None:
            tuner.merge(safe_merge=True)
        else:  # rounding the sum to 4 bits again would lose what was learned
            for adapter in tuner.active_adapters:
                plain.weight.data += tuner.get_delta_weight(adapter).to(plain.weight)
        _replace(model, name, base if plain is None else plain)
        merged += 1
    if hasattr(model, "peft_config"):
        del model.peft_config  # type: ignore[attr-defined]
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
    return merged
