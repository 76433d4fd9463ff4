"""Is a damaged file named, with what it looks like and what to do, wherever weights and configs are opened?"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mllm.damage import damage_in, damage_of, disk_full, naming_damage, read_json, read_safetensors
from mllm.encoders.hf_weights import load_donor, read_published_config
from mllm.encoders.weights import read_weights
from mllm.errors import CheckpointError, ConfigError
from mllm.eval.checkpoint import load_model
from mllm.models.build import build_model, load_tokenizer
from mllm.models.chat import ChatSession
from mllm.models.export import export
from mllm.models.weight_files import read_part, read_tensors
from mllm.recipe import StageSpec
from mllm.serve.server import ServeSettings, plan
from mllm.train.checkpoint.export import DONE, is_finished
from mllm.train.checkpoint.files import MANIFEST, problem_of
from mllm.train.engine.base import choose_engine
from mllm.train.run import _naming_a_full_disk
from mllm.train.stages.contrastive.dual_encoder import _hf_dual
from mllm.train.stages.contrastive.stage import ContrastiveOptions
from mllm.types import WeightsSource
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from tests.helpers import TINY_LLM, tiny_model, tiny_spec, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
LOOKS = {
    "cut": "cut short",
    "lfs": r"Git LFS pointer .* 988097824 bytes: run `git lfs pull`",
    "page": "web page",
    "empty": "is empty",
    "zeros": "begins with zeros",
}


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    cut = whole[: len(whole) * 2 // 3]
    page = b"<!DOCTYPE html><title>Sign in</title>"
    path.write_bytes(
        {"cut": cut, "lfs": POINTER.encode(), "page": page, "empty": b"", "zeros": bytes(len(whole))}[kind]
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours``: a checkpoint; ``clip``, ``llm``: published parts; ``tokenizer``: a visual tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    model, processor = tiny_model(folder / "words")
    for part in (model, processor):
        part.save_pretrained(folder / "ours")
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )  # fmt: skip
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY_LLM.items() if k != "model_type"})).save_pretrained(
        folder / "llm"
    )
    tiny_tokenizer().save_pretrained(folder / "llm")
    build_tokenizer(VISUAL_TOKENIZERS.get("vq").tiny()).save_pretrained(folder / "tokenizer")
    return folder


def test_a_template_with_transformers_own_tags_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    whole = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    whole += "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    file.write_text(whole)
    assert damage_of(file) is None
    file.write_text(whole[:-20])
    assert "no whole template" in str(damage_of(file))


@pytest.mark.parametrize("kind", LOOKS)
def test_what_a_file_looks_like(tmp_path: Path, kind: str) -> None:
    save_file({"a": torch.ones(64), "b": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllm", "list": list(range(50))}))
    assert damage_in(tmp_path) is None
    for name, read in (("model.safetensors", read_safetensors), ("config.json", read_json)):
        whole = (tmp_path / name).read_bytes()
        damage(tmp_path / name, kind)
        with pytest.raises(CheckpointError, match=LOOKS[kind]) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
        assert damage_in(tmp_path) == damage_of(tmp_path / name)
        (tmp_path / name).write_bytes(whole)


def test_other_damage(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(tmp_path / "gone")
    assert "a link to" in str(damage_of(file))
    file.unlink()
    file.write_bytes(b"\x1f\x8b" + bytes(100))
    assert "archive" in str(damage_of(file))
    save_file({"a": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes() + b"more")
    assert "something was added" in str(damage_of(file))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )
    assert "shard model-00002-of-00002.safetensors of 1" in str(damage_in(tmp_path))
    (tmp_path / "word.gguf").write_bytes(b"GGML" + bytes(10))
    assert "not a GGUF file" in str(damage_of(tmp_path / "word.gguf"))


OPENERS = {
    "ours": {
        "load_model": lambda f: load_model(str(f)),
        "chat": lambda f: ChatSession.load(str(f)),
        "export": lambda f: export(f, f.parent / "exported"),
        "tensors": read_tensors,
        "part": lambda f: read_part(f, "model."),
    },
    "clip": {
        "weights": lambda f: load_donor(
            CLIPVisionModel(CLIPVisionConfig.from_pretrained(f)),
            CLIPVisionConfig.from_pretrained(f),
            WeightsSource(source=str(f)),
        ),
        "folder": read_weights,
    },
    "llm": {"build": lambda f: build_model(tiny_spec(str(f), language_model={"source": str(f)}))},
    "tokenizer": {"tokenizer": VisualTokenizer.from_pretrained},
}


@pytest.mark.parametrize("kind", ["cut", "lfs"])
@pytest.mark.parametrize("part", OPENERS)
def test_every_opener_of_weights_names_the_file(parts: Path, tmp_path: Path, part: str, kind: str) -> None:
    folder = shutil.copytree(parts / part, tmp_path / part)
    damage(folder / "model.safetensors", kind)
    for name, call in OPENERS[part].items():
        with pytest.raises(CheckpointError, match=LOOKS[kind]) as caught:
            call(folder)
        assert f"{folder}/model.safetensors" in str(caught.value) and "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("part", "file", "call"),
    [
        ("ours", "config.json", lambda f: load_model(str(f))),
        ("ours", "config.json", lambda f: plan(ServeSettings(checkpoint=str(f)))),
        ("ours", "tokenizer.json", lambda f: load_model(str(f))),
        ("ours", "processor_config.json", lambda f: ChatSession.load(str(f))),
        ("ours", "generation_config.json", lambda f: load_model(str(f))),
        ("ours", "chat_template.jinja", lambda f: ChatSession.load(str(f))),
        ("clip", "config.json", lambda f: read_published_config(WeightsSource(source=str(f)))),
        ("llm", "tokenizer.json", lambda f: load_tokenizer(tiny_spec(str(f)).language_model)),
        ("llm", "config.json", lambda f: build_model(tiny_spec(str(f), language_model={"source": str(f)}))),
        ("tokenizer", "config.json", VisualTokenizer.from_pretrained),
    ],
)  # fmt: skip
def test_every_opener_of_configs_names_the_file(parts: Path, tmp_path: Path, part: str, file: str, call) -> None:
    folder = shutil.copytree(parts / part, tmp_path / part)
    damage(folder / file, "cut")
    with pytest.raises(CheckpointError, match=r"ends in the middle|not valid JSON|no whole template") as caught:
        call(folder)
    assert str(folder / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LOOKS)
def test_a_torch_file_is_told_like_the_others(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "optimizer.pt"
    torch.save({"a": torch.ones(4)}, file)
    assert damage_of(file) is None and damage_in(tmp_path) is None
    damage(file, kind)
    with pytest.raises(CheckpointError, match=LOOKS[kind]), naming_damage(tmp_path):
        torch.load(file, weights_only=True)


def test_what_resuming_and_a_stages_settings_read_is_named(tmp_path: Path) -> None:
    engine = tmp_path / "zero.json"
    engine.write_text('{"zero_optimization": {"stage": 2}, "a')
    learn = {"connector": 1e-3}
    stage = StageSpec.model_validate({"name": "sft", "data": "x", "steps": 1, "learn": learn, "engine": str(engine)})
    with pytest.raises(ConfigError, match=r"stages\.sft\.engine: .*zero\.json: not valid JSON: ends in the middle"):
        choose_engine(stage)
    engine.write_text(POINTER)
    with pytest.raises(ConfigError, match=r"stages\.sft\.engine: .*zero\.json: is a Git LFS pointer"):
        choose_engine(stage)
    (tmp_path / DONE).write_text('{"stage": "sft", "fi')
    with pytest.raises(CheckpointError, match=rf"{DONE}: not valid JSON: ends in the middle"):
        is_finished(tmp_path)
    (tmp_path / MANIFEST).write_text(POINTER)
    assert "Git LFS pointer" in str(problem_of(tmp_path))


def test_a_contrastive_stages_text_encoder_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 7}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = SimpleNamespace(
        config=SimpleNamespace(weights=None, info=SimpleNamespace(image=SimpleNamespace(height=28)))
    )
    options = ContrastiveOptions(source=str(tmp_path))
    assert _hf_dual(encoder, options, "stages.clip.options").max_length == 16
    for name in ("model.safetensors", "tokenizer.json"):
        whole = (tmp_path / name).read_bytes()
        for kind in ("lfs", "cut"):
            damage(tmp_path / name, kind)
            with pytest.raises(CheckpointError, match=f"{name}: .*({LOOKS[kind]}|ends in the middle)"):
                _hf_dual(encoder, options, "stages.clip.options")
            (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("file", "call"),
    [
        ("generation_config.json", lambda f: AutoModelForImageTextToText.from_pretrained(f)),
        ("generation_config.json", lambda f: load_model(str(f))),
        ("tokenizer_config.json", lambda f: AutoProcessor.from_pretrained(f)),
        ("tokenizer_config.json", lambda f: ChatSession.load(str(f))),
    ],
)
def test_a_file_whose_absence_changes_answers_without_a_word_is_missed(
    parts: Path, tmp_path: Path, file: str, call
) -> None:
    folder = shutil.copytree(parts / "ours", tmp_path / "ours")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: no such file, and without it"):
        call(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_processor_names_the_file_that_is_cut_short(parts: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(parts / "ours", tmp_path / "ours")
    damage(folder / file, "cut")
    with pytest.raises(CheckpointError, match=f"{file}: not valid JSON"):
        AutoProcessor.from_pretrained(folder)


def test_a_full_disk_is_known_by_what_safetensors_says_too() -> None:
    said = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert disk_full(said) == disk_full(OSError(errno.ENOSPC, "")) == "No space left on device"
    assert disk_full(OSError(errno.EACCES, "Permission denied")) is None
    assert disk_full(ValueError("(os error 13)")) is None and disk_full(CheckpointError(str(said))) is None
    with (
        pytest.raises(CheckpointError, match=r"the disk is full .* go on with --resume"),
        _naming_a_full_disk(Path("run")),
    ):
        raise said
