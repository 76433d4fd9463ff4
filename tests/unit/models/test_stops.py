"""Does generation stop at the end of the turn that was learned, whoever saves, merges and reopens the model?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, LlamaConfig

from mllm.models.build import build_model
from mllm.models.export import export
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.processor import MllmProcessor
from mllm.processing.turns import special_ids
from mllm.recipe import ModelSpec
from mllm.train.preflight.first_row import show_row, stop_line
from tests.helpers import TINY_CLIP, TINY_LLM, tiny_tokenizer
from tests.real.tokenizers import template


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model like Phi-3: its turns end with an added special token that is not EOS, and it stops at one more."""
    folder = tmp_path_factory.mktemp("phi")
    words = tiny_tokenizer(image_token=None, template=None)
    words.add_tokens([AddedToken(t, special=True) for t in ("<|user|>", "<|assistant|>", "<|end|>", "<|fim|>")])
    words.chat_template = template("phi-3")
    words.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in TINY_LLM.items() if k != "model_type"}))
    model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<|fim|>")]
    model.save_pretrained(folder)
    return folder


def test_the_end_of_the_turn_and_the_models_own_stops_are_kept(source: Path, tmp_path: Path) -> None:
    spec = ModelSpec.model_validate(
        {"language_model": {"source": str(source)}, "encoders": {"a": dict(TINY_CLIP)}, "connector": {"type": "mlp"}}
    )
    model, processor = build_model(spec)
    words = processor.tokenizer
    end = words.convert_tokens_to_ids("<|end|>")
    assert end in special_ids(words)
    wanted = {words.eos_token_id, end, words.convert_tokens_to_ids("<|fim|>")}
    assert set(model.generation_config.eos_token_id) == wanted
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "merged")
    for folder in ("saved", "merged"):
        again = MllmForConditionalGeneration.from_pretrained(tmp_path / folder)
        assert set(again.generation_config.eos_token_id) == wanted, folder
        assert set(json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"]) == wanted
    assert "<|end|>" in stop_line(processor, again.generation_config.eos_token_id)
    with torch.no_grad():  # it says <|end|> whatever it is asked
        again.lm_head.weight.zero_()
        hook = again.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor(end), 9.0))
        reopened = MllmProcessor.from_pretrained(tmp_path / "merged")
        inputs = reopened.apply_chat_template(
            [{"role": "user", "content": "3?"}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )  # fmt: skip
        out = again.generate(**inputs, max_new_tokens=9)
        hook.remove()
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_template_options_are_kept_and_a_misspelt_one_is_named(source: Path, tmp_path: Path) -> None:
    from mllm.errors import ConfigError

    jinja = tmp_path / "own.jinja"
    jinja.write_text(
        template("phi-3").replace("'<|assistant|>\\n'", "'<|assistant|>\\n' + ('' if thinking is not defined or thinking else '-')")
    )  # fmt: skip
    data = {"language_model": {"source": str(source)}, "chat_template": str(jinja)}
    parts = {"encoders": {"a": dict(TINY_CLIP)}, "connector": {"type": "mlp"}}
    with pytest.raises(ConfigError, match=r"does not read 'thinkin'; it reads .*thinking"):
        build_model(
            ModelSpec.model_validate({**data, **parts, "template_options": {"thinkin": False}}), load_weights=False
        )
    _, processor = build_model(
        ModelSpec.model_validate({**data, **parts, "template_options": {"thinking": False}}), load_weights=False
    )
    processor.save_pretrained(tmp_path / "p")
    again = MllmProcessor.from_pretrained(tmp_path / "p")
    assert again.template_options == {"thinking": False}
    ask = [{"role": "user", "content": "q"}]
    for one in (processor, again):
        assert one.apply_chat_template(ask, add_generation_prompt=True).endswith("<|assistant|>\n-")
        assert one.tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False).endswith("\n-")
        assert one.apply_chat_template(ask, add_generation_prompt=True, thinking=True).endswith("<|assistant|>\n")


def test_a_row_is_shown_with_what_is_learned_in_green(source: Path) -> None:
    from mllm.processing.chat import encode_text
    from mllm.types import IMAGE_MARK, Turn

    spec = {"language_model": {"source": str(source)}, "encoders": {"a": dict(TINY_CLIP)}, "connector": {"type": "mlp"}}
    _, processor = build_model(ModelSpec.model_validate(spec), load_weights=False)
    ids, labels = encode_text(processor, [Turn("user", f"{IMAGE_MARK}\nq [b]?"), Turn("assistant", "Red.")])
    shown = show_row(ids.tolist(), labels.tolist(), processor)
    assert (
        shown.plain
        == f"<|user|>\n[<image> × {processor.rules.layout().num_tokens}]\nq [b]?<|end|>\n<|assistant|>\nRed.<|end|>\n"
    )
    green = "".join(shown.plain[s.start : s.end] for s in shown.spans if "green" in str(s.style))
    assert green == "Red.<|end|>"
    assert stop_line(processor).startswith("generation stops at <|end|> (")


def test_a_row_with_a_video_is_shown_with_all_of_its_frames(source: Path) -> None:
    import numpy as np

    from mllm.train.preflight.first_row import what_is_learned
    from mllm.types import IMAGE_MARK, Sample, Turn, Video

    spec = {"language_model": {"source": str(source)}, "encoders": {"a": dict(TINY_CLIP)}, "connector": {"type": "mlp"}}
    _, processor = build_model(ModelSpec.model_validate({**spec, "video": {"frames": 3}}), load_weights=False)
    clip = Video(np.zeros((5, 16, 16, 3), np.uint8))
    sample = Sample("one", [Turn("user", f"{IMAGE_MARK}q?"), Turn("assistant", "Red.")], [clip], "clips")
    rows = type("Rows", (), {"random_access": True, "shards": None, "__getitem__": lambda self, row: sample})()
    data = SimpleNamespace(
        draws=lambda: iter([SimpleNamespace(dataset=0, row=0)]), mixture=SimpleNamespace(sources=[rows])
    )
    shown = what_is_learned(processor, data)
    assert any(f"[<image> × {3 * processor.rules.layout().num_tokens}]" in str(line) for line in shown)
