"""Is what other libraries print shown where nothing else says it, and only there?"""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from mllm.errors import CheckpointError, ConfigError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.text_source import open_language_model
from mllm.noise import load_report_unless_told
from mllm.recipe import LanguageModelSpec
from mllm.visual_tokenizers.base import build_tokenizer
from tests.helpers import TINY_LLM, tiny_model
from tests.unit.visual_tokenizers.tokenizer_configs import TINY


@pytest.fixture
def said():
    """What transformers' reading of weights logs."""
    records, logger = [], logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def _change(folder, **changed):
    """Leave weights out of a folder's file (None), or put some in."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, tensor in changed.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, file, {"format": "pt"})


def test_a_load_report_is_not_shown_beside_an_error_of_ours_that_says_it(tmp_path, said):
    model, _ = tiny_model(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "ours")
    _change(tmp_path / "ours", **{"model.language_model.norm.weight": None, "stranger": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 weights are missing \(model.language_model.norm.weight\).*stranger"):
        MllmForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert not said


def test_a_load_report_is_shown_where_nothing_else_says_it(tmp_path, said):
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(tmp_path)
    _change(tmp_path, stranger=torch.ones(2))
    open_language_model(LanguageModelSpec(source=str(tmp_path)), torch.float32)
    assert len(said) == 1 and "stranger" in said[0], "weights that are passed over"
    _change(tmp_path, **{"model.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"1 weights have another shape \(model.norm.weight\)"):
        open_language_model(LanguageModelSpec(source=str(tmp_path)), torch.float32)
    assert len(said) == 1, "the error says it"
    with pytest.raises(RuntimeError, match="above report"), load_report_unless_told():
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(said) == 2 and "model.norm.weight" in said[1], "the error sends its reader there"
    with pytest.raises(ConfigError), load_report_unless_told():
        logging.getLogger("transformers.modeling_utils").warning("another matter")
        raise ConfigError("no")
    assert said[2:] == ["another matter"]


def test_a_dualtoken_source_without_some_weights_is_refused(tmp_path, said):
    """They started at random, and a report on the terminal was all that said so."""
    vision = {k: v for k, v in TINY["dualtoken"]["vision"].items() if k != "model_type"}
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(tmp_path)
    tokenizer = {**TINY["dualtoken"], "weights": {"source": str(tmp_path)}}
    build_tokenizer(tokenizer).load_pretrained()
    name = next(name for name in load_file(tmp_path / "model.safetensors") if name.endswith("layers.0.mlp.fc1.weight"))
    _change(tmp_path, **{name: None})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights, which would start at random \(.*layers.0.mlp.fc1.weight\)"
    ):
        build_tokenizer(tokenizer).load_pretrained()
    assert not said
