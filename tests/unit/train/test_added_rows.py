"""Do rows of tokens that a model's source never read learn beside an adapter, and is it said how many?"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.errors import ConfigError
from mllm.models import lora
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.vocabulary import add_image_token, add_tokens, added_ids, give_padding, num_token_ids
from mllm.recipe import StageSpec
from mllm.train.added_rows import added_rows, rows_line
from mllm.train.engine.groups import apply_learning
from tests.helpers import TINY_LLM, tiny_model, tiny_tokenizer

KNOWN = 256  # the source read bytes; <pad>, <s>, </s>, <|im_start|>, <|im_end|> and <image> are new


def _model(folder, *, tied=False, image_token="<image>"):
    source = folder / "source"
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**{**settings, "vocab_size": KNOWN, "tie_word_embeddings": tied}))
    language_model.save_pretrained(source)
    tiny_tokenizer(image_token=image_token).save_pretrained(source)
    return tiny_model(folder / "tokenizer", language_model={"source": str(source)})[0]


def _stage(learn, **changes):
    return StageSpec.model_validate({"name": "sft", "data": "x", "steps": 1, "learn": learn, **changes})


def _inputs(model):
    ids = [7, 259, *[model.config.image_token_id] * model.config.layout().num_tokens, 9, 260, 11]
    infos = model.model.vision_tower.infos
    pixels = {
        model.model.pixel_keys[name]: torch.randn(1, 3, info.image.height, info.image.width)
        for name, info in infos.items()
    }
    return {"input_ids": torch.tensor([ids]), **pixels}


@pytest.mark.parametrize("image_token", ["<image>", None])
def test_the_config_says_which_ids_are_new_to_the_source(tmp_path, image_token):
    model = _model(tmp_path, image_token=image_token)
    assert model.config.added_token_ids == [KNOWN, 262] and model.config.image_token_id == 261
    assert added_rows(model) == [256, 257, 258, 259, 260]
    model.config.save_pretrained(tmp_path / "saved")
    assert MllmConfig.from_pretrained(tmp_path / "saved").added_token_ids == [KNOWN, 262]


def _without(ids, **special):
    """The tests' tokenizer with tokens that have other ids: every id is what ``ids`` gives for its place."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = [f"t{place}" for place in range(len(ids))]
    backend = Tokenizer(models.BPE(vocab=dict(zip(names, ids)), merges=[], unk_token=None))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_an_added_token_never_takes_the_id_of_another():
    """The tokenizers library counts tokens, and the count is somebody's id where ids are left out: pictures stood for that word."""
    tokenizer = _without([*range(5), *range(6, 11)])
    with pytest.raises(
        ConfigError, match=r"'<image>' the id 10, which 't9' has: .* leaves out 1 ids .*\(5\).*<\|unused_5\|>"
    ):
        add_image_token(tokenizer, "<image>")
    with pytest.raises(ConfigError, match="'<seg>' the id 10"):
        add_tokens(_without([*range(5), *range(6, 11)]), {"<seg>": True})


def test_new_ids_are_told_where_a_vocabulary_leaves_ids_out():
    """As tokenizers made of cl100k do; counted by their number, the rows of new tokens were taken for none and did not learn."""
    tokenizer = _without([*range(10), 15], additional_special_tokens=["t10"])
    before = set(tokenizer.get_vocab().values())
    assert added_ids(before, tokenizer, 64) == [16, 16] and added_ids(before, tokenizer, 12) == [15, 16]
    add_tokens(tokenizer, {"<seg>": True, "<point>": True})
    assert tokenizer.convert_tokens_to_ids("<seg>") == 16 and len(tokenizer) == 13
    assert added_ids(before, tokenizer, 64) == [16, 18] and num_token_ids(tokenizer) == 18


def test_a_tokenizer_without_padding_fills_up_with_what_it_has():
    tokenizer = _without(range(10), eos_token="t3")
    give_padding(tokenizer)
    assert tokenizer.pad_token_id == 3
    with pytest.raises(ConfigError, match="neither pad_token, eos_token nor unk_token"):
        give_padding(_without(range(10)))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_no_token_has_start_at_the_mean_and_are_never_written(tmp_path, tied):
    """At random they were written: a frozen language model of 49,152 tokens answered with id 49,206, which decodes to nothing."""
    model = _model(tmp_path, tied=tied).eval()
    assert model.config.num_token_ids == 262 and model.config.unassigned_ids == range(262, 320)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            assert len(table) == 320 and torch.equal(table[262:], table[262:263].expand(58, -1))
            torch.testing.assert_close(table[262], table[:KNOWN].mean(0), atol=1e-6, rtol=1e-5)
            assert (table[256:261] - table[262]).norm(dim=-1).min() > 0
        model.get_output_embeddings().weight[300] *= 1e4
        model.get_output_embeddings().weight[301] *= -1e4
        inputs = _inputs(model)
        assert int(model(**inputs).logits[0, -1].argmax()) in (300, 301)
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        first = int(answer[0])
        other = model.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[first])
    assert len(answer) and int(answer.max()) < 262
    other = other[0, inputs["input_ids"].shape[1] :]
    assert first not in other and int(other.max()) < 262, "a caller's own list of tokens holds beside ours"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "parts", [["language_model"], ["language_model", "connector"], ["connector", "language_model"]]
)
def test_added_rows_learn_beside_the_adapters_and_are_merged_into_both_tables(tmp_path, tied, parts):
    model = _model(tmp_path, tied=tied).eval()
    names = [name for name, _ in model.named_parameters()]
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    groups = apply_learning(model, _stage({part: {"lr": 1e-3, "lora": {"r": 2}} for part in parts}))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(lora.is_adapter(name) for name in learning)
    rows = [name for name, p in learning.items() if p.shape == (5, 64)]
    assert len(rows) == (1 if tied else 2) and {g.part for g in groups} == set(parts)
    inputs = _inputs(model)
    labels = inputs["input_ids"].clone()
    model(**inputs, labels=labels, skip_logits=True).loss.backward()
    for name, p in learning.items():
        if name in rows or "lora_B" in name:  # lora_A has a zero gradient while lora_B is zero
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    with torch.no_grad():
        for p in learning.values():
            p.add_(torch.randn_like(p) * 0.1)
        wanted = model(**inputs).logits
        assert lora.merge(model) > len(rows)
        torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    assert [name for name, _ in model.named_parameters()] == names and not lora.has_adapters(model)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is output) is tied
    for old, new in ((before, embedding), (head, output)):
        assert (old != new).any(1).nonzero().flatten().tolist() == [256, 257, 258, 259, 260]


def test_what_cannot_hold_is_refused_and_what_does_not_learn_is_said(tmp_path):
    model = _model(tmp_path)
    adapter = {"lr": 1e-3, "lora": {"r": 2}}
    with pytest.raises(
        ConfigError, match=r"learn\.language_model\.lora: 5 rows .* ZeRO-3 cannot do; use engine: fsdp2"
    ):
        apply_learning(model, _stage({"language_model": adapter}), zero_stage=3)
    assert rows_line(model, _stage({"language_model": adapter})) == (
        "rows of added tokens: all 5 learn beside the adapter"
    )
    still = _stage({"language_model": {"lr": 1e-3, "lora": {"r": 2, "added_tokens": False}}})
    assert "none of 5 learns, learn.language_model.lora.added_tokens is false" in str(rows_line(model, still))
    assert "language_model is frozen" in str(rows_line(model, _stage({"connector": 1e-3})))
    assert "all 5 learn with the whole language_model" in str(rows_line(model, _stage({"language_model": 1e-3})))
    apply_learning(model, still, zero_stage=3)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.shape == (5, 64)]
    model.config.added_token_ids = [261, 262]
    assert "its row is never read" in str(rows_line(model, still))
    model.config.added_token_ids = None
    assert "not recorded" in str(rows_line(model, still)) and rows_line(model, _stage({"connector": 1e-3})) is None


def test_a_head_with_a_bias_which_peft_would_drop_is_refused(tmp_path):
    model = _model(tmp_path)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    with pytest.raises(ConfigError, match="PEFT drops the bias"):
        apply_learning(model, _stage({"language_model": {"lr": 1e-3, "lora": {"r": 2}}}))
