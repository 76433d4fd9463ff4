"""How does a checkpoint become something that answers?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(checkpoint: str, *, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint folder or hub id, on the GPU when there is one. Ours and any image-text model
    of transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    return model.to(torch.device(place)).eval(), AutoProcessor.from_pretrained(checkpoint)


def open_generator(
    checkpoint: str, *, kind: str = "hf", batch_size: int = 8, dtype: str = "float32", device: str | None = None
) -> Any:
    """A generator over a checkpoint. kind: ``hf`` (in this process) or ``vllm``. Under a launcher each process takes
    the GPU of its LOCAL_RANK."""
    import os

    if kind == "vllm":
        from mllm.eval.generators.vllm import VLLMGenerator

        return VLLMGenerator(checkpoint, dtype=dtype)
    if kind != "hf":
        raise ConfigError(f"generator {kind!r}: expected hf or vllm")
    from mllm.eval.generators.hf import HFGenerator

    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    model, processor = load_model(checkpoint, dtype=dtype, device=device)
    return HFGenerator(model, processor, batch_size=batch_size, name=f"hf:{Path(checkpoint).name}")
