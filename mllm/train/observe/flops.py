"""How many floating-point operations does a training step need, and what share of the hardware's peak is that?

Only useful work counts: no recomputation, no padding, no head on unsupervised positions, no optimizer, no embedding
look-up. A multiply-add is two operations. Attention is counted exactly by packed sample: causal ``2 · L · d · s²``
forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mllm.encoders.shapes import OnlyShapes
from mllm.models.making import num_elements, shape_of

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}
"""Dense bf16 peak by a part of the GPU's name, from the makers' data sheets."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step: the language model's alone, and with encoders, connector and router."""

    language_model: float
    total: float


@dataclass
class FlopModel:
    """Operation counts of one model in one stage; `step` turns a batch's sizes into operations."""

    matmul: float
    """Weights of the decoder's matrix products."""
    adapters: float
    """Weights of its LoRA matrices."""
    head: float
    """Weights of the output head."""
    attention: float
    """Forward operations of causal attention at length s, divided by s²."""
    encoders: dict[str, float] = field(default_factory=dict)
    """Forward operations of one image, by encoder."""
    connector: float = 0.0
    """Forward operations of connector and router for one image."""
    trained: frozenset[str] = frozenset()
    """Parts with a learning parameter."""
    language_model_full: bool = True
    """Whether the language model's own weights learn (not only adapters)."""

    cached: bool = False
    """Encoders do not run: their features come from disk."""

    def step(self, *, tokens: int, squares: float, supervised: int, views: int) -> StepFlops:
        """tokens: non-padding positions; squares: sum of squared sample lengths; supervised: rows sent to the head; views: of all
        images, one each where a picture is seen once."""
        visual = any(part != "language_model" for part in self.trained)
        learns = "language_model" in self.trained
        if learns and self.language_model_full:
            factor, head = 6.0, 6.0
        else:  # gradients pass through, or (nothing before it learns) the model is only read
            factor = head = 4.0 if learns or visual else 2.0
        text = factor * self.matmul * tokens + 6.0 * self.adapters * tokens + head * self.head * supervised
        text += self.attention * squares * (3.0 if learns or visual else 1.0)
        vision = 0.0
        if not self.cached:
            for name, flops in self.encoders.items():
                vision += flops * views * (3.0 if f"encoders.{name}" in self.trained else 1.0)
        vision += self.connector * views * (3.0 if "connector" in self.trained else 2.0 if visual else 1.0)
        return StepFlops(text, text + vision)


def flop_model(model: MllmForConditionalGeneration, trained: Iterable[str]) -> FlopModel:
    """Count a model's operations from its modules; no forward pass on real weights (works on the meta device too)."""
    decoder, head = model.get_decoder(), model.lm_head
    config = model.config.get_text_config()
    matmul = adapters = 0.0
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            size = float(module.in_features * module.out_features)
            adapters, matmul = (adapters + size, matmul) if ".lora_" in f".{name}" else (adapters, matmul + size)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    names = frozenset(trained)
    encoders, connector = _image_flops(model)
    return FlopModel(
        matmul=matmul,
        adapters=adapters,
        head=float(num_elements(head.weight)),
        attention=2.0 * layers * width,
        encoders=encoders,
        connector=connector,
        trained=names,
        language_model_full=adapters == 0,
    )


def _image_flops(model: MllmForConditionalGeneration) -> tuple[dict[str, float], float]:
    """Forward operations of one view: by encoder, and of connector and router together."""
    bank = getattr(getattr(model, "model", model), "vision_tower", None)
    if bank is None:
        return {}, 0.0
    pixels = {
        name: torch.zeros(1, info.image.channels, info.image.height, info.image.width, device="meta")
        for name, info in bank.infos.items()
    }
    encoders, features = {}, {}
    for name, encoder in bank.encoders.items():
        encoders[name], features[name] = _count(encoder, (pixels[name],), {})
        if name in bank.with_attention:
            features[name] = _count(encoder, (pixels[name],), {"return_attention": True})[1]
    projector = model.model.multi_modal_projector
    if model.model.rules.native:  # what is counted then are patches; attention among more of them is left out
        tokens = {name: info.num_tokens for name, info in bank.infos.items()}
        weights = sum(num_elements(p) for p in projector.parameters() if p.dim() > 1)
        return {name: flops / tokens[name] for name, flops in encoders.items()}, 2.0 * weights
    if bank.experts:
        tokens = model.model.rules.view.num_tokens
        return encoders, 2.0 * tokens * sum(num_elements(p) for p in projector.parameters() if p.dim() > 1)
    return encoders, _count(projector, (features,), {})[0]


def _meta_state(module: nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        shape = shape_of(tensor)
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(shape, dtype=dtype, device="meta")
    return state


def _count(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[float, Any]:
    """Operations of one forward pass, and its result, on meta tensors."""
    with torch.no_grad(), OnlyShapes(), FlopCounterMode(display=False) as counter:
        result = torch.func.functional_call(module, _meta_state(module), arguments, named)
    return float(counter.get_total_flops()), result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 operations per second by the maker's data sheet; None where it is not known. Nothing is measured instead: a
    processor that does other work too gives a peak that says little, and so a share of it that says less."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
    return None
