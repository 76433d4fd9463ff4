"""Do a checkpoint's trained parts and the published language model give the checkpoint again, and nothing else?"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import CheckpointError
from mllm.models import lora
from mllm.models.export import export
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import StageSpec
from mllm.train.checkpoint.export import save_adapters, write_model
from mllm.train.engine.groups import apply_learning
from tests.helpers import TINY_LLM, tiny_model, tiny_tokenizer

LORA = {"lr": 1e-3, "lora": {"r": 2, "use_rslora": True}}
WITHOUT = "--without-language-model"


def _publish(folder, *, seed=0, tied=False):
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "vocab_size": 256, "tie_word_embeddings": tied}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _checkpoint(folder, learn, *, tied=False, dtype=torch.float32):
    """What a stage writes whose every learning weight has moved."""
    _publish(folder / "source", tied=tied)
    model, processor = tiny_model(folder / "tokenizer", language_model={"source": str(folder / "source")})
    model.to(dtype)
    apply_learning(model, StageSpec.model_validate({"name": "sft", "data": "x", "steps": 1, "learn": learn}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    final = folder / "final"
    final.mkdir()
    if lora.has_adapters(model):
        save_adapters(model, final / "adapters.safetensors")
        lora.merge(model)
    write_model(model, processor, final)
    recipe = {
        "model": {"language_model": {"source": str(folder / "source")}},
        "stages": [{"name": "sft", "learn": learn}],
    }
    (final / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return final


def _logits(folder):
    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    ids = [7, 259, *[model.config.image_token_id] * model.config.layout().num_tokens, 9, 260, 11]
    torch.manual_seed(0)
    pixels = {
        model.model.pixel_keys[name]: torch.randn(1, 3, info.image.height, info.image.width).to(model.dtype)
        for name, info in model.model.vision_tower.infos.items()
    }
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **pixels).logits


@pytest.mark.parametrize(
    ("learn", "tied", "dtype"),
    [
        ({"connector": 1e-3, "language_model": LORA}, False, torch.float32),
        ({"connector": 1e-3, "language_model": LORA}, True, torch.bfloat16),
        ({"connector": 1e-3}, True, torch.float32),
    ],
)
def test_the_parts_and_the_language_model_give_the_checkpoint_again(tmp_path, learn, tied, dtype):
    final = _checkpoint(tmp_path, learn, tied=tied, dtype=dtype)
    parts = export(final, tmp_path / "parts", without_language_model=True)
    names = {name for file in parts.glob("*.safetensors") for name in load_file(file)}
    assert any("multi_modal_projector" in name for name in names)
    assert not any(
        "language_model" in name and ".lora_" not in name and not name.startswith("rows_of.") for name in names
    )
    assert any(".lora_" in name for name in names) == ("language_model" in learn)
    assert "mllm export owner/parts whole" in (parts / "README.md").read_text()
    whole = export(parts, tmp_path / "whole")
    before, after = (load_file(folder / "model.safetensors") for folder in (final, whole))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(_logits(final), _logits(whole))


@pytest.mark.parametrize("learn", [{"language_model": 1e-3}, {"connector": 1e-3, "language_model": LORA}])
def test_a_language_model_that_the_adapter_does_not_explain_is_refused(tmp_path, learn):
    """The second: an adapter of another stage than the one that lies there."""
    final = _checkpoint(tmp_path, learn)
    if (final / "adapters.safetensors").is_file():
        (final / "adapters.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"is not .*source with the adapter.*Leave {WITHOUT} out"):
        export(final, tmp_path / "parts", without_language_model=True)
    assert not (tmp_path / "parts").exists()


def test_another_base_a_damaged_file_and_a_command_that_wants_all_are_one_line(tmp_path):
    final = _checkpoint(tmp_path, {"connector": 1e-3})
    parts = export(final, tmp_path / "parts", without_language_model=True)
    for command in (["chat", str(parts), "-q", "hi"], ["serve", str(parts)]):
        said = CliRunner().invoke(app, command)
        assert isinstance(said.exception, CheckpointError) and f"mllm export {parts} WHOLE" in str(said.exception)
    with pytest.raises(CheckpointError, match="without its language model"):
        MllmForConditionalGeneration.from_pretrained(parts)
    cut = shutil.copytree(parts, tmp_path / "cut") / "trained_parts.safetensors"
    cut.write_bytes(cut.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="cut short"):
        export(cut.parent, tmp_path / "whole")
    flipped = shutil.copytree(parts, tmp_path / "flipped") / "trained_parts.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="another sha256"):
        export(flipped.parent, tmp_path / "whole")
    _publish(tmp_path / "source", seed=1)
    expected = json.loads((parts / "language_model.json").read_text())["sha256"][:12]
    with pytest.raises(CheckpointError, match=f"source is another language model .*expected {expected}"):
        export(parts, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
