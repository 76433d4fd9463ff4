"""Do other people's ways to generate give the tokens that plain greedy decoding gives, or say why not?"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, pipeline

from mllm.errors import AlignmentError, ConfigError
from tests.helpers import picture
from tests.real.conftest import joined

TOKENS = 10


def conversations() -> list[list[dict[str, Any]]]:
    def image(seed: int) -> dict[str, Any]:
        return {"type": "image", "image": picture(seed)}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    contents = [
        [image(1), text("What is in the picture?")],
        [text("Name three fruits and their colours, please, in one sentence.")],
        [image(2), text("and"), image(3), text("differ how? Repeat: differ how? differ how?")],
    ]
    return [[{"role": "user", "content": content}] for content in contents]


def prompt(processor: Any, rows: list[Any], **padding: Any) -> Any:
    return processor.apply_chat_template(
        rows,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **padding},
    )


def answer(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 2, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def asked(cut_model: tuple[Any, Any]) -> tuple[Any, list[Any], list[list[int]]]:
    """Inputs of all prompts together, of each alone, and each one's answer alone."""
    model, processor = cut_model
    each = [prompt(processor, [row]) for row in conversations()]
    alone = [answer(model, inputs)[0] for inputs in each]
    assert len({tuple(row) for row in alone}) == 3
    return prompt(processor, conversations()), each, alone


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ],
    ids=str,
)
def test_a_batch_as_the_processor_pads_it_answers_like_each_prompt_alone(cut_model: Any, asked: Any, options: Any):
    model, _ = cut_model
    together, _, alone = asked
    if "return_dict_in_generate" in options:
        output = model.generate(**together, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=2, **options)
        got = output.sequences[:, together["input_ids"].shape[1] :].tolist()
    else:
        got = answer(model, together, **options)
    assert got == [row for row in alone for _ in range(options.get("num_return_sequences", 1))]


def test_a_quantised_cache_answers_as_the_language_models_own_class_does_or_names_its_package(
    cut_model: Any, asked: Any
):
    """transformers quantises the whole prompt at once, so that plain decoding may answer otherwise: the reference has the same cache."""
    model, _ = cut_model
    together, _, _ = asked
    options: dict[str, Any] = {"cache_implementation": "quantized"}
    if importlib.util.find_spec("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum") is None:
        with pytest.raises(ImportError, match="pip install optimum-quanto"):
            answer(model, together, **options)
        return
    seen: list[torch.Tensor] = []
    language_model = model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**together)
    hook.remove()
    reference = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    reference.model.load_state_dict(language_model.state_dict())
    reference.lm_head.weight = model.lm_head.weight
    alone = {"attention_mask": together["attention_mask"], "max_new_tokens": TOKENS, "do_sample": False}
    options |= {"cache_config": {"backend": "quanto", "nbits": 4}}
    expected = reference.generate(inputs_embeds=seen[0], eos_token_id=None, pad_token_id=2, **alone, **options)
    assert answer(model, together, **options) == expected.tolist()


def test_beams_with_several_answers_each_keep_their_own_images(cut_model: Any, asked: Any):
    model, _ = cut_model
    together, each, _ = asked
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    assert answer(model, together, **options) == [row for inputs in each for row in answer(model, inputs, **options)]


def test_drafts_of_a_smaller_model_and_from_the_prompt_change_no_token(cut_model: Any, asked: Any):
    model, processor = cut_model
    _, each, alone = asked
    drafter = copy.deepcopy(model)
    drafter.model.language_model.layers = drafter.model.language_model.layers[:1]
    drafter.config.text_config.num_hidden_layers = drafter.model.language_model.config.num_hidden_layers = 1
    for inputs, expected in zip(each, alone):
        assert answer(model, inputs, assistant_model=drafter) == [expected]
        assert answer(model, inputs, prompt_lookup_num_tokens=4, max_matching_ngram_size=1) == [expected]
    # The words after the first "Look:", which would be drafted, are placeholders.
    inputs = processor(text="Look: <image> is nice. Look:", images=picture(1), return_tensors="pt")
    assert answer(model, inputs, prompt_lookup_num_tokens=5) == answer(model, inputs)


def test_a_text_model_drafts_for_text_and_is_refused_before_images(cut_model: Any, asked: Any, smollm: Path):
    model, processor = cut_model
    _, each, alone = asked
    drafter = AutoModelForCausalLM.from_pretrained(smollm / "cut", dtype=torch.float32)
    tokenizers = {
        "tokenizer": processor.tokenizer,
        "assistant_tokenizer": AutoTokenizer.from_pretrained(smollm / "cut"),
    }
    assert answer(model, each[1], assistant_model=drafter, **tokenizers) == [alone[1]]
    with pytest.raises(ConfigError, match="assistant_model: LlamaForCausalLM does not read the prompt's images"):
        answer(model, each[0], assistant_model=drafter, **tokenizers)


def test_what_would_not_see_the_images_or_continue_padding_is_refused(cut_model: Any, asked: Any):
    model, processor = cut_model
    _, each, alone = asked
    right = prompt(processor, conversations(), padding_side="right")
    with pytest.raises(AlignmentError, match=r"prompt 0 of 3 ends in padding.*padding_side='left'"):
        answer(model, right)
    with pytest.raises(ConfigError, match="prefill_chunk_size=7: a prompt with images is read whole"):
        answer(model, each[0], prefill_chunk_size=7)
    assert answer(model, each[1], prefill_chunk_size=7) == [alone[1]]
    with pytest.raises(ConfigError, match="assistant_early_exit"):
        answer(model, each[0], assistant_early_exit=2)
    for options in ({"penalty_alpha": 0.6, "top_k": 4}, {"force_words_ids": [[100]], "num_beams": 2}):
        with pytest.raises(ValueError, match="Search requires `trust_remote_code=True`"):  # code of other people's
            answer(model, each[0], **options)


def test_constraints_on_tokens_hold_and_a_placeholder_is_never_one(cut_model: Any, asked: Any):
    model, processor = cut_model
    together, each, alone = asked
    allowed = [200, 300, 400]
    got = answer(model, together, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert {token for row in got for token in row} <= set(allowed)
    assert alone[0][0] not in answer(model, each[0], bad_words_ids=[[alone[0][0]]])[0]
    wish = {(processor.image_token_id,): 1e4}
    assert processor.image_token_id not in answer(model, each[0], sequence_bias=wish)[0]


def test_a_second_turn_goes_on_from_the_first_ones_cache(cut_model: Any, asked: Any):
    model, processor = cut_model
    _, each, _ = asked
    first = model.generate(**each[0], max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    tail = processor.tokenizer("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, tail], 1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answer(model, {**each[0], **text})
    assert answer(model, text, past_key_values=first.past_key_values) == expected


def test_opened_with_another_attention_or_with_weights_on_disk_it_answers_the_same(
    cut_model: Any, asked: Any, tmp_path: Path
):
    model, _ = cut_model
    together, _, alone = asked
    model.save_pretrained(tmp_path / "model")
    layers = {"model.language_model": "disk", "lm_head": "disk"}
    pictures = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk"}
    cpu = dict.fromkeys((*layers, *pictures), "cpu")
    for options in (
        {"attn_implementation": "eager"},
        {"device_map": {**cpu, **layers}, "offload_folder": str(tmp_path / "a")},
        {"device_map": {**cpu, **pictures}, "offload_folder": str(tmp_path / "b")},
        {"device_map": "auto", "max_memory": {"cpu": "150MB"}, "offload_folder": str(tmp_path / "c")},
    ):
        opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", **options)
        if "max_memory" in options:
            assert len(set(opened.hf_device_map.values())) == 2, opened.hf_device_map
        assert answer(opened, together) == alone, options
    with pytest.raises(ValueError, match='attn_implementation="nonsense"` is not supported'):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model", attn_implementation="nonsense")


def test_a_compiled_forward_answers_the_same(cut_model: Any, asked: Any):
    model, _ = cut_model
    together, _, alone = asked
    compiled = copy.copy(model)  # the same weights; the attribute is set on the copy
    compiled.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert answer(compiled, together, cache_implementation="static") == alone


def test_the_pipeline_answers_with_sense_and_as_the_model_does(smollm: Path, asked: Any, cut_model: Any):
    model, processor = cut_model
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": TOKENS, "generate_kwargs": {"eos_token_id": None}, "return_full_text": False}
    said = [row[0]["generated_text"] for row in ask(text=conversations(), **options)]
    assert said == [processor.decode(row, skip_special_tokens=True) for row in asked[2]]
    both = ask(
        images=[picture(1), picture(2)], text=["<image> what", "<image> is longer"], batch_size=2, max_new_tokens=3
    )
    assert [row["input_text"] for row in both] == ["<image> what", "<image> is longer"]
    whole, reader = joined(smollm / "whole")
    ask = pipeline("image-text-to-text", model=whole, processor=reader)
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    assert "Paris" in ask(text=question, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
