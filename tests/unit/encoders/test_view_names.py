"""Has every weight of the published checkpoints a place, and is none asked for that they lack?"""

# pyright: reportArgumentType=false

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mllm.encoders import ENCODERS, multiview
from mllm.encoders.catalogue import build_encoder, expanded
from mllm.encoders.view_points import READERS
from mllm.types import EncoderInfo, ImageSpec

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLISHED = json.loads(gzip.decompress((GOLDEN / "view_names.json.gz").read_bytes()))
"""Preset → names and shapes of the whole model's weights."""

NO_POINTS = {"da3-metric-large", "da3-mono-large", "pi3x"}
"""Each picture alone, so no cameras; heads of another kind."""
INFO = EncoderInfo(image=ImageSpec(height=504, width=504), grid=(36, 36), width=1)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_checkpoint_of_the_published_size_loads_whole(preset, tmp_path, monkeypatch):
    """On meta, by name and shape: nothing is missing, and nothing of encoder and heads is left over."""
    state = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED[preset].items()}
    monkeypatch.setattr(multiview, "read_weights", lambda path: dict(state))
    spec = {**expanded(preset, "encoder"), "weights": {"source": str(tmp_path)}, "keep_prefix": True}
    reader_of, plain = READERS[spec["type"]], ENCODERS.get(spec["type"]).Config(**spec)
    if preset in NO_POINTS:
        with torch.device("meta"):
            build_encoder(plain.model_copy(update={"info": INFO})).load_pretrained()
        return
    config = plain.model_copy(update={"layers": reader_of.layers_read(plain.depth), "info": INFO})  # nothing runs
    with torch.device("meta"):
        reader = reader_of(build_encoder(config))
    reader.load()
