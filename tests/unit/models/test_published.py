"""Is a published language model taken as it is, read once, and refused where weights are missing?"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from mllm.errors import CheckpointError
from mllm.models.build import build_model
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from tests.helpers import TINY_LLM, tiny_spec, tiny_tokenizer


def _published(folder, *, tied: bool):
    torch.manual_seed(1)
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    source = AutoModelForCausalLM.from_config(LlamaConfig(**settings, tie_word_embeddings=tied))
    source.save_pretrained(str(folder / "source"))
    tiny_tokenizer().save_pretrained(str(folder / "source"))
    return source


def _build(folder):
    spec = {"source": str(folder / "source"), "tokenizer": str(folder / "source")}
    torch.manual_seed(3)
    return build_model(tiny_spec(str(folder / "source"), language_model=spec))


@pytest.mark.parametrize("tied", [True, False])
def test_a_published_language_model_is_put_in_whole(tmp_path, tied):
    source = _published(tmp_path, tied=tied)
    model, _ = _build(tmp_path)
    found = model.model.language_model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.base_model.state_dict().items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.config.text_config is model.model.language_model.config, "settings must reach the layers"
    assert model.training and all(module.training for module in model.modules())
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, logits = source.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    assert (wanted - logits).abs().max() < 1e-6
    model.save_pretrained(str(tmp_path / "out"))
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    again = MllmForConditionalGeneration.from_pretrained(str(tmp_path / "out"), device_map={"": "cpu"})
    for name, tensor in [*again.named_parameters(), *again.named_buffers()]:
        assert not tensor.is_meta, name
    with torch.no_grad():
        assert (again.eval()(input_ids=ids).logits - logits).abs().max() < 1e-6


def test_parts_without_weights_do_not_depend_on_the_language_models(tmp_path):
    _published(tmp_path, tied=True)
    first, _ = _build(tmp_path)
    torch.manual_seed(3)
    scratch, _ = build_model(tiny_spec(str(tmp_path / "source")))
    for name, parameter in first.model.multi_modal_projector.named_parameters():
        assert torch.equal(parameter, scratch.model.multi_modal_projector.get_parameter(name)), name


def test_a_source_that_lacks_weights_is_refused(tmp_path):
    _published(tmp_path, tied=False)
    file = tmp_path / "source" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"language_model\.source.*1 weights are missing.*layers\.1\.mlp\.up_proj"
    ):
        _build(tmp_path)
