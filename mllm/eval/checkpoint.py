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
    checkpoint: str,
    *,
    kind: str = "hf",
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    base_url: str | None = None,
    concurrency: int = 8,
) -> Any:
    """A generator over a checkpoint. kind: ``hf`` (in this process), ``vllm``, or ``openai`` (the server at
    ``base_url``, which knows the checkpoint by this name). Under a launcher each process takes
    the GPU of its LOCAL_RANK among those it sees."""
    import os

    if kind == "vllm":
        from mllm.eval.generators.vllm import VLLMGenerator

        return VLLMGenerator(checkpoint, dtype=dtype)
    if kind == "openai":
        from mllm.eval.generators.openai import OpenAIGenerator

        if not base_url:
            raise ConfigError("generator openai: where is the server? base_url, e.g. http://localhost:8000/v1")
        return OpenAIGenerator(checkpoint, base_url, concurrency=concurrency)
    if kind != "hf":
        raise ConfigError(f"generator {kind!r}: expected hf, vllm or openai")
    from mllm.eval.generators.hf import HFGenerator

    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    model, processor = load_model(checkpoint, dtype=dtype, device=device)
    return HFGenerator(model, processor, batch_size=batch_size, name=f"hf:{Path(checkpoint).name}")
