"""Do recipes and checkpoints from before heads had names still open?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.processor import MllmProcessor
from mllm.recipe import ModelSpec, StageSpec
from mllm.train.engine.groups import learning_by_part, recipe_parts
from tests.unit.heads.drawing_models import drawing_model

FORMER = {"language_model": {"source": "x"}, "visual_tokenizer": {"weights": "y"}, "visual_head": {"type": "separate"}}


def rewrite_as_before(folder: Path) -> None:
    """Make a saved drawing model look as one was saved when it had a single ``visual_head``."""
    config = json.loads((folder / "config.json").read_text())
    config["visual_head"] = config.pop("heads")["draw"]
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = {name.replace("heads.draw.", "visual_head."): value for name, value in load_file(str(file)).items()}
    save_file(tensors, str(file), metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["separate", "vocabulary"])
def test_a_checkpoint_with_one_visual_head_draws_the_same_and_is_saved_under_present_names(
    kind, tmp_path: Path
) -> None:
    model, processor = drawing_model(tmp_path / "parts", kind)
    model.save_pretrained(tmp_path / "old")
    processor.save_pretrained(tmp_path / "old")
    rewrite_as_before(tmp_path / "old")
    opened = MllmForConditionalGeneration.from_pretrained(tmp_path / "old").eval()
    assert list(opened.heads) == ["visual_head"] and opened.visual_config.type == kind
    again = MllmProcessor.from_pretrained(tmp_path / "old")
    first = model.generate_images("Draw a 3", processor=processor, seed=1, cfg_scale=2.0)
    second = opened.generate_images("Draw a 3", processor=again, seed=1, cfg_scale=2.0)
    assert torch.equal(first.packed, second.packed)
    opened.save_pretrained(tmp_path / "new")
    names = load_file(str(tmp_path / "new" / "model.safetensors")).keys()
    assert not any(name.startswith("visual_head") for name in names)
    assert any(name.startswith("heads.visual_head") for name in names) == (kind == "separate")
    assert "visual_head" not in json.loads((tmp_path / "new" / "config.json").read_text())
    renewed = MllmForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    third = renewed.generate_images("Draw a 3", processor=again, seed=1, cfg_scale=2.0)
    assert torch.equal(first.packed, third.packed)


def test_a_recipe_with_one_visual_head_names_the_same_part() -> None:
    spec = ModelSpec.model_validate(FORMER)
    assert spec.heads == {"visual_head": {"type": "separate"}}
    stage = StageSpec(name="s", learn={"visual_head": 1e-3}, data="d", steps=1)
    assert list(learning_by_part(recipe_parts(spec), stage)) == ["heads.visual_head"]
