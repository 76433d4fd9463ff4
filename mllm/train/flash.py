"""Which of the attention kernels that are installed runs, where a stage says ``attention: auto``?

torch runs FlashAttention 2 of its own. A package of FlashAttention 3 (``flash_attn_interface``) or 4 (``flash_attn.cute``) can take its
place for all of torch's attention, compiled or not. It is tried first with the heads that the model has, forward and backward, against
torch's own: a kernel that cannot do them, or does them otherwise, is left out, and the reason told. torch calls both experimental.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.train import flash4
from mllm.varlen import segment_attention

PACKAGES = {"FA4": "flash_attn.cute", "FA3": "flash_attn_interface"}
"""torch's name of an implementation → the module that has it; the newest first."""
_CAPABILITIES = {"FA4": (9, 10), "FA3": (9,)}
_REGISTER = {"FA4": flash4.register}
"""Of whom torch's own registration does not do."""
_TOLERANCE = 2e-2
"""Largest difference from torch's own kernel, by the largest value: both round to bf16 in other places."""
_TOKENS, _EMPTY, _WINDOW = (130, 257, 61), (0, 0), 70
"""Of the samples of a trial; packed rows are filled up with ends of empty ones, to a number that few graphs are compiled for."""


@dataclass(frozen=True)
class Heads:
    """What a model's attention is asked for."""

    width: int
    query: int
    key: int
    packed: bool
    """By the variable-length kernel, each token seeing those before it; otherwise all see all."""
    window: bool = False
    """Each token sees the nearest before it only."""


def heads_of(model: nn.Module, text_config: Any) -> list[Heads]:
    """The kinds of heads in a model: the language model's, and the widths that its other modules say they have."""
    query = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // query
    key = getattr(text_config, "num_key_value_heads", None) or query
    slides = getattr(text_config, "sliding_window", None) is not None
    found = [Heads(width, query, key, packed=True, window=window) for window in ([False, True] if slides else [False])]
    decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set(map(id, decoder.modules())) if decoder is not None else set()
    widths = set()
    for module in model.modules():
        for name in ("head_dim", "attention_head_size"):
            value = getattr(module, name, None)
            if isinstance(value, int) and id(module) not in inside:
                widths.add(value)
    return found + [Heads(width, 4, 4, packed=False) for width in sorted(widths)]


def has_dropout(model: nn.Module) -> bool:
    """Whether some attention drops scores while training, which these kernels do not."""
    for module in model.modules():
        if "ttention" not in type(module).__name__:
            continue
        for name in ("attention_dropout", "dropout_p", "attn_drop"):
            value = getattr(module, name, 0.0)
            share = value.p if isinstance(value, nn.Dropout) else value
            if isinstance(share, (int, float)) and share > 0:
                return True
    return False


def adopt(model: nn.Module, text_config: Any, device: torch.device) -> tuple[str | None, str]:
    """Put the newest installed kernel in torch's place, where it is right for the model's heads.

    Returns:
        torch's name of it (None: torch's own stays), and a sentence on what runs and why no other.
    """
    release()
    own = (
        "attention runs by torch's FlashAttention 2" if device.type == "cuda" else "attention runs by torch on the CPU"
    )
    if device.type != "cuda":
        return None, own
    installed = [name for name, module in PACKAGES.items() if _is_installed(module)]
    if not installed:
        return None, f"{own}: no package of FlashAttention 3 (flash_attn_interface) or 4 (flash-attn-4) is installed"
    if has_dropout(model):
        return None, f"{own}: the model drops attention scores, which {' and '.join(installed)} cannot"
    major, reasons = torch.cuda.get_device_capability(device)[0], []
    for name in installed:
        if major not in _CAPABILITIES[name]:
            reasons.append(f"{name} is not for compute capability {major}")
            continue
        problem = tried(name, heads_of(model, text_config), device)
        if problem is None:
            return name, f"attention runs by FlashAttention {name[-1]} ({PACKAGES[name]}), tried against torch's own"
        reasons.append(f"{name}: {problem}")
    return None, f"{own}: {'; '.join(reasons)}"


def kernel_of(implementation: str) -> str:
    """A run's attention for its record: with the kernel's package where one was adopted."""
    from torch.nn.attention import current_flash_attention_impl

    name = current_flash_attention_impl()
    return implementation if name is None else f"{implementation} ({name}: {PACKAGES.get(name, 'a package')})"


def release() -> None:
    """torch's own kernel runs again."""
    from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def tried(name: str, heads: list[Heads], device: torch.device) -> str | None:
    """Activate an implementation and compare it with what ran before. Returns None where it is right, and it stays; otherwise what is
    wrong, and torch's own runs again."""
    from torch.nn.attention import activate_flash_attention_impl, register_flash_attention_impl

    with ExitStack() as undo:
        undo.callback(release)
        try:
            wanted = [_outcome(kind, device) for kind in heads]
            if name in _REGISTER:
                register_flash_attention_impl(name, register_fn=_REGISTER[name])
            activate_flash_attention_impl(name)
            found = [_outcome(kind, device) for kind in heads]
        except Exception as error:  # whatever an unfinished kernel raises is a reason against it
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        for kind, before, after in zip(heads, wanted, found, strict=True):
            far = max(
                float((a - b).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in zip(before, after, strict=True)
            )
            if not far <= _TOLERANCE:
                return f"with heads of {kind.width} it differs from torch's own by {far:.1%}"
        undo.pop_all()
    return None


def _outcome(kind: Heads, device: torch.device) -> list[Tensor]:
    """Output and gradients of one attention, the same inputs every time."""
    total = sum(_TOKENS)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(heads: int) -> Tensor:
        values = torch.randn(total, heads, kind.width, generator=generator, device=device)
        return values.bfloat16().requires_grad_()

    query, key, value = inputs = random(kind.query), random(kind.key), random(kind.key)
    if kind.packed:
        ends = torch.tensor([0, *_TOKENS, *_EMPTY], device=device).cumsum(0).int()
        window = _WINDOW if kind.window else None
        output = segment_attention(query, key, value, ends, max(_TOKENS), causal=True, window=window)
    else:
        query, key, value = (t.view(2, total // 2, *t.shape[1:]).transpose(1, 2) for t in inputs)
        output = F.scaled_dot_product_attention(query, key, value)
    gradient = torch.randn(output.shape, generator=generator, device=device).to(output.dtype)
    return [t.detach().float() for t in (output, *torch.autograd.grad(output, inputs, gradient))]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package that cannot be imported
        return False
