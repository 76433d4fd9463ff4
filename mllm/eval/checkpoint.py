"""How does a checkpoint become something that answers?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm.damage import opening
from mllm.errors import CheckpointError, ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(checkpoint: str, *, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint folder or hub id, on the GPU when there is one. Ours and any image-text model
    of transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with opening(checkpoint), _naming_kind(checkpoint):
        model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        processor = AutoProcessor.from_pretrained(checkpoint)
    return model.to(torch.device(place)).eval(), processor


@contextmanager
def _naming_kind(checkpoint: str) -> Iterator[None]:
    """Say of a checkpoint that transformers opens, but as no image-text model, what it is."""
    try:
        yield
    except ValueError as error:
        found = re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", str(error))
        if found is None:
            raise
        raise CheckpointError(
            f"{checkpoint}: a {found[1]} checkpoint, which is no image-text model; evaluated are checkpoints of mllm and "
            "transformers' models that read pictures"
        ) from error


def open_generator(
    checkpoint: str,
    *,
    kind: str = "hf",
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    base_url: str | None = None,
    concurrency: int = 8,
    picture_cache: int = 1024,
) -> Any:
    """A generator over a checkpoint. kind: ``hf`` (in this process), ``vllm``, ``openai`` (the server at ``base_url``, which
    knows the checkpoint by this name), or a plug-in's. Raises `UnknownName`."""
    from mllm.eval.generators import GENERATORS, GeneratorSettings

    settings = GeneratorSettings(batch_size, dtype, device, base_url, concurrency, picture_cache)
    generator: Any = GENERATORS.get(kind)
    if not hasattr(generator, "open"):
        raise ConfigError(
            f"generator {kind!r}: {generator.__name__} has no class method open(checkpoint, settings), which makes one for a checkpoint"
        )
    return generator.open(checkpoint, settings)
