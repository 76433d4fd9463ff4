"""Do a checkpoint's trained parts and what is published give the checkpoint again, to the bit, and nothing else?"""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.eval.generators.vllm import VLLMGenerator
from mllm.models import lora
from mllm.models.build import build_model
from mllm.models.export import export
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import StageSpec
from mllm.train.checkpoint.export import save_adapters, write_model
from mllm.train.engine.groups import apply_learning
from tests.helpers import TINY_CLIP, TINY_LLM, TINY_TIMM, tiny_spec, tiny_tokenizer

LORA = {"lr": 1e-3, "lora": {"r": 2, "use_rslora": True}}
DORA = {"lr": 1e-3, "lora": {"r": 4, "use_dora": True, "target": ["q_proj", "down_proj"]}}
FOUR_BITS = {"lr": 1e-3, "lora": {"r": 2, "bits": 4}}
WITHOUT = "--without-language-model"


def _publish(folder, *, seed=0, tied=False):
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "vocab_size": 256, "tie_word_embeddings": tied}))
    model.save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    vision = {key: value for key, value in TINY_CLIP["architecture"].items() if key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "vision")


def _spec(folder):
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    clip = {**TINY_CLIP, "weights": {"source": str(folder / "vision"), "licence": "MIT", "commercial": True}}
    return tiny_spec(
        str(folder / "tokenizer"),
        language_model={"source": str(folder / "source")},
        encoders={"semantic": clip, "detail": dict(TINY_TIMM)},
    )


def _run(folder, *stages, tied=False):
    """What a run writes, whose every learning weight has moved; stages: (what learns, dtype). Returns the last one's folder."""
    _publish(folder, tied=tied)
    spec = _spec(folder)
    recipe = {
        "model": {"language_model": {"source": str(folder / "source")}},
        "stages": [{"name": f"s{k}", "learn": learn, "dtype": dtype} for k, (learn, dtype) in enumerate(stages)],
    }
    final = None
    for stage, (learn, dtype) in zip(recipe["stages"], stages, strict=True):
        torch.manual_seed(len(stage["name"]))
        if final is None:
            model, processor = build_model(spec, dtype=getattr(torch, dtype))
        else:
            model = MllmForConditionalGeneration.from_pretrained(final, dtype=getattr(torch, dtype))
        apply_learning(model, StageSpec.model_validate({"name": "x", "data": "x", "steps": 1, "learn": learn}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        final = folder / "run" / stage["name"]
        final.mkdir(parents=True)
        if lora.has_adapters(model):
            save_adapters(model, final / "adapters.safetensors")
            lora.merge(model)
        write_model(model, processor, final)
        (final / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (final / "stage.json").write_text(json.dumps({"stage": stage["name"], "files": {}}))
    return final


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _same(before, after):
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stages", "tied"),
    [
        ([({"connector": 1e-3, "language_model": LORA}, "float32")], False),
        ([({"connector": 1e-3, "language_model": DORA}, "bfloat16")], True),
        ([({"connector": 1e-3}, "bfloat16"), ({"language_model": LORA}, "float32")], True),
        ([({"language_model": LORA}, "float32"), ({"language_model": DORA}, "bfloat16")], False),
        ([({"language_model": FOUR_BITS}, "bfloat16"), ({"connector": 1e-3}, "bfloat16")], False),
    ],
)
def test_the_parts_and_what_is_published_give_the_checkpoint_again(tmp_path, stages, tied):
    if importlib.util.find_spec("bitsandbytes") is None and "'bits'" in str(stages):
        pytest.skip("bitsandbytes is not installed")
    final = _run(tmp_path, *stages, tied=tied)
    parts = export(final, tmp_path / "parts", without_language_model=True)
    kept = load_file(parts / "trained_parts.safetensors")
    assert any("multi_modal_projector" in name for name in kept) and any(".detail." in name for name in kept)
    assert not any(name.startswith(("model.language_model.", "lm_head.")) or ".semantic." in name for name in kept)
    adapted = [k for k, (learn, _) in enumerate(stages) if "language_model" in learn]
    assert sorted(p.name for p in parts.glob("adapters*")) == [f"adapters.s{k}.safetensors" for k in adapted]
    whole = export(parts, tmp_path / "whole")
    _same(_weights(final), _weights(whole))
    _same(
        MllmForConditionalGeneration.from_pretrained(final).state_dict(),
        AutoModelForImageTextToText.from_pretrained(parts).state_dict(),
    )


def test_an_encoder_is_left_out_where_its_source_gives_it_tensor_by_tensor(tmp_path):
    final = _run(tmp_path, ({"encoders.semantic": {"lr": 1e-3, "last_layers": 1}}, "float32"))
    parts = export(final, tmp_path / "parts", without_language_model=True)
    left = json.loads((parts / "left_out.json").read_text())["encoders"]["semantic"]
    kept = [name for name in load_file(parts / "trained_parts.safetensors") if ".semantic." in name]
    assert left["source"] == str(tmp_path / "vision") and len(left["tensors"]) > len(kept) > 0
    assert all(".layers.1." in name or "norm" in name for name in kept)
    _same(_weights(final), _weights(export(parts, tmp_path / "whole")))
    (tmp_path / "vision").rename(tmp_path / "gone")
    with pytest.raises(
        UnavailableError, match=r"the encoder semantic .*not at hand.* copy it to .*vision; or give another place"
    ):
        MllmForConditionalGeneration.from_pretrained(parts)
    again = export(final, tmp_path / "again", without_language_model=True)
    assert json.loads((again / "left_out.json").read_text())["encoders"] == {}
    _same(_weights(final), _weights(export(again, tmp_path / "as_before")))


def test_weights_that_were_merged_elsewhere_come_out_as_they_were(tmp_path):
    """A GPU adds in another order: last places differ."""
    final = _run(tmp_path, ({"language_model": LORA}, "float32"))
    weights = _weights(final)
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    weights[name][::3] = torch.nextafter(weights[name][::3], torch.tensor(torch.inf))
    save_file(weights, final / "model.safetensors", {"format": "pt"})
    parts = export(final, tmp_path / "parts", without_language_model=True)
    bits = load_file(parts / "trained_parts.safetensors")[f"bits_of.{name}"]
    assert 0 < len(bits) < weights[name].numel()
    _same(weights, _weights(export(parts, tmp_path / "whole")))


def _learned_whole(final):
    return {"s0": {"language_model": 1e-3}}, ConfigError, rf"learned whole, in stage s0.*leave {WITHOUT} out"


def _without_a_stage(final):
    (final.parent / "s0" / "adapters.safetensors").unlink()
    return (
        {},
        ConfigError,
        rf"by an adapter in stage s0, which is not there \(.*s0.adapters.safetensors\).*leave {WITHOUT} out",
    )


def _another_adapter(final):
    shutil.copy(final.parent / "s0" / "adapters.safetensors", final)
    return {}, CheckpointError, rf"is not .*source with the adapters of s0, s1: \d+ of \d+ tensors.*leave {WITHOUT} out"


def _moved(final):
    weights = _weights(final)
    weights["model.language_model.layers.0.input_layernorm.weight"] += 1e-6
    save_file(weights, final / "model.safetensors", {"format": "pt"})
    return {}, CheckpointError, r"1 of \d+ tensors are others \(model.language_model.layers.0.input_layernorm.weight\)"


@pytest.mark.parametrize("spoil", [_learned_whole, _without_a_stage, _another_adapter, _moved])
def test_a_language_model_that_the_adapters_do_not_explain_is_refused(tmp_path, spoil):
    final = _run(tmp_path, ({"language_model": LORA}, "float32"), ({"language_model": LORA}, "float32"))
    learns, error, message = spoil(final)
    recipe = yaml.safe_load((final / "recipe.yaml").read_text())
    for stage in recipe["stages"]:
        stage["learn"] = learns.get(stage["name"], stage["learn"])
    (final / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(error, match=message):
        export(final, tmp_path / "parts", without_language_model=True)
    assert not (tmp_path / "parts").exists()


def test_another_base_a_damaged_file_and_a_server_are_one_line(tmp_path):
    final = _run(tmp_path, ({"connector": 1e-3}, "float32"))
    parts = export(final, tmp_path / "parts", without_language_model=True)
    said = CliRunner().invoke(app, ["serve", str(parts)])
    assert isinstance(said.exception, CheckpointError) and f"mllm export {parts} WHOLE" in str(said.exception)
    with pytest.raises(CheckpointError, match="a whole one is needed here"):
        VLLMGenerator(str(parts))
    said = CliRunner().invoke(app, ["chat", str(parts), "-q", "hi", "--max-new-tokens", "2"])
    assert said.exit_code == 0, said.output
    card = CliRunner().invoke(app, ["push", str(final), "me/small", WITHOUT, "--card-only"]).stdout
    assert "mllm export me/small whole" in card and f"| encoder semantic | `{tmp_path / 'vision'}` |" in card
    assert "mllm export" not in CliRunner().invoke(app, ["push", str(final), "me/small", "--card-only"]).stdout

    cut = shutil.copytree(parts, tmp_path / "cut") / "trained_parts.safetensors"
    cut.write_bytes(cut.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="cut short"):
        export(cut.parent, tmp_path / "whole")
    flipped = shutil.copytree(parts, tmp_path / "flipped") / "trained_parts.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="another sha256"):
        export(flipped.parent, tmp_path / "whole")
    elsewhere = shutil.copytree(parts, tmp_path / "elsewhere") / "left_out.json"
    record = json.loads(elsewhere.read_text())
    record["language_model"]["tensors"]["model.language_model.norm.weight"] = "0" * 64
    elsewhere.write_text(json.dumps(record))
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ tensors .*norm.weight.*compute otherwise. Written with .*torch"
    ):
        MllmForConditionalGeneration.from_pretrained(elsewhere.parent)
    _publish(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="source is another language model than the one"):
        MllmForConditionalGeneration.from_pretrained(parts)
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(
        UnavailableError, match=r"language model .*is not at hand.* copy it to .*source; or give another"
    ):
        export(parts, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
