"""Does a mixture of reading and drawing train through the ordinary recipe, resume exactly and show its drawings?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from mllm.cli.draw import add_to
from mllm.demo.drawing import prepare_drawing, train_text_tokenizer
from mllm.errors import ConfigError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.processor import MllmProcessor
from mllm.recipe import Recipe
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.images import DigitsAndCharts, DigitsAndChartsOptions
from mllm.visual_tokenizers.storage import encode_images
from tests.helpers import TINY_LLM
from tests.unit.visual_tokenizers.tokenizer_configs import TINY


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unified")
    prepare_drawing(root / "pictures", size=16)
    train_text_tokenizer(root / "text")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY["illume"]).eval()
    tokenizer.save_pretrained(root / "tokenizer")
    prepare_drawing(root / "stored", size=16, codes=True)
    for split in ("train", "held_out"):
        source = DigitsAndCharts(DigitsAndChartsOptions(charts=0), 16, split)
        encode_images(tokenizer, source, root / "stored" / "codes" / split)
    return root


def recipe(root: Path, kind: str = "pictures", **stage: Any) -> Recipe:
    def dataset(name: str) -> dict[str, Any]:
        path = str(root / kind / f"{name}_train.jsonl")
        return {"dataset": {"name": name, "format": "messages", "path": path, "licence": "CC-BY-4.0"}}

    settings = {
        "name": "unified",
        "learn": {"connector": 1e-3, "language_model": 1e-3, "heads": 1e-3},
        "data": {"datasets": [dataset("read"), dataset("draw")]},
        "steps": 6,
        "batch_size": 4,
        "max_length": 128,
        "dtype": "float32",
        "draw": {"prompts": ["Draw a 3.", "Draw a 7."], "every": 2, "cfg_scale": 2.0},
        **stage,
    }
    model = {
        "language_model": {"config": {**TINY_LLM, "vocab_size": 384}, "tokenizer": str(root / "text")},
        "encoders": {"codes": {"type": "visual_tokenizer", "weights": {"source": str(root / "tokenizer")}}},
        "connector": {"type": "mlp"},
        "visual_tokenizer": {"encoder": "codes"},
        "heads": {"draw": {"type": "separate", "text_dropout": 0.3}},
        "chat_template": "vicuna",
    }
    return Recipe.model_validate({"name": "unified", "model": model, "stages": [settings]})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


def test_a_mixture_trains_shows_its_drawings_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    whole = run_recipe(recipe(data), output=tmp_path / "whole")
    run_recipe(recipe(data), output=tmp_path / "parts", stop_after=3)
    quiet = recipe(
        data, draw={"prompts": ["Draw a 5."], "every": 1}
    )  # drawing more or less changes nothing that is learned
    parts = run_recipe(quiet, output=tmp_path / "parts", resume=True)
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert sorted(p.name for p in (tmp_path / "whole" / "drawings").iterdir()) == [
        "unified-000002.png",
        "unified-000004.png",
        "unified-000006.png",
    ]
    assert Image.open(tmp_path / "whole" / "drawings" / "unified-000006.png").size == (32, 16)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(set(r.get("head_loss", {})) == {"draw/semantic", "draw/pixel"} for r in records)
    before = build_tokenizer(TINY["illume"])
    before.load_state_dict(load_file(str(data / "tokenizer" / "model.safetensors")))
    for name, tensor in before.state_dict().items():
        assert torch.equal(first[f"model.vision_tower.encoders.codes.tokenizer.{name}"], tensor), (
            "a frozen tokenizer moved"
        )
    model, processor = MllmForConditionalGeneration.from_pretrained(whole), MllmProcessor.from_pretrained(whole)
    drawn = model.generate_images("Draw a 7.", processor=processor, seed=3)
    app = typer.Typer()
    app.callback()(lambda: None)
    add_to(app)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["draw", str(whole), "Draw a 7.", "--seed", "3", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert Image.open(out / "000.png").tobytes() == drawn.pil()[0].tobytes()


def test_training_on_stored_codes_equals_training_on_pictures(data: Path, tmp_path: Path) -> None:
    pictures = run_recipe(recipe(data, steps=3), output=tmp_path / "pictures")
    stored = run_recipe(recipe(data, "stored", steps=3), output=tmp_path / "stored")
    first, second = weights(pictures), weights(stored)
    worst = max(float((first[k].float() - second[k].float()).abs().max()) for k in first)
    assert worst < 1e-5, f"weights differ by {worst:.1e}"


def test_settings_that_contradict_each_other_are_refused_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head draw .type .* trains with none, sharded, zero1 or zero2"):
        run_recipe(recipe(data, engine="zero3"), output=tmp_path / "a")
    scales = recipe(data, packing=True)
    scales.model.heads = {"draw": {"type": "next_scale"}}
    with pytest.raises(ConfigError, match="packing: a next_scale head needs a mask of its own"):
        run_recipe(scales, output=tmp_path / "c")
    plain = recipe(data)
    plain.model.heads = {}
    with pytest.raises(ConfigError, match="draw: the model draws nothing"):
        run_recipe(plain, output=tmp_path / "b")
