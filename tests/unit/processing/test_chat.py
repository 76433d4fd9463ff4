"""Are labels exactly what the assistant says, for any chat template?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.processing.chat import IGNORE, encode_sample, encode_text, render_prompt
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.processor import MllmProcessor
from mllm.processing.template import check_template, for_training, shipped_templates, with_images
from mllm.processing.turns import ChatRenderer, added_texts, find_replies, special_ids
from mllm.types import IMAGE_MARK, ImageSpec, Sample, Turn, ViewLayout
from tests.helpers import picture, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<|im_start|>{{ role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}


def processor_with(template: str, *, tokens: int = 4) -> MllmProcessor:
    images = MllmImageProcessor(
        encoders={"a": ImageSpec(height=8, width=8)}, layout=ViewLayout(num_tokens=tokens, grid=(2, 2))
    )
    return MllmProcessor(images, tiny_tokenizer(template=None), chat_template=template)


def all_templates() -> dict[str, str]:
    return {**TEMPLATES, **{name: path.read_text().rstrip("\n") for name, path in shipped_templates().items()}}


def reference_labels(processor: MllmProcessor, turns: list[Turn]) -> list[int]:
    """Token by token: everything the model would have to produce after each generation prompt, up to the token that ends the
    turn; where no special token does, up to what the next turn begins with."""
    tokenizer = processor.tokenizer

    def ids(text: str) -> list[int]:
        text = text.replace("<image>", "<image>" * processor.rules.layout().num_tokens)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    full = ids(render_prompt(processor, turns, add_generation_prompt=False))
    labels = [IGNORE] * len(full)
    for k, turn in enumerate(turns):
        if turn.role != "assistant" or not turn.learn:
            continue
        before = ids(render_prompt(processor, turns[:k], add_generation_prompt=True))
        after = ids(render_prompt(processor, turns[: k + 1], add_generation_prompt=False))
        assert full[: len(before)] == before and full[: len(after)] == after
        ends = [i for i in range(len(before), len(after)) if full[i] in special_ids(tokenizer)]
        stop = ends[-1] + 1 if ends else len(after)
        labels[len(before) : stop] = full[len(before) : stop]
    return labels


@pytest.mark.parametrize("name", sorted(all_templates()))
def test_labels_equal_a_token_by_token_reference(name: str) -> None:
    processor = processor_with(all_templates()[name])
    turns = [
        Turn("user", f"{IMAGE_MARK}\nWhat is it? assistant"),
        Turn("assistant", "A cat."),
        Turn("user", "assistant: A cat. Sure?"),
        Turn("assistant", "not this one", learn=False),
        Turn("user", f"And {IMAGE_MARK} here?"),
        Turn("assistant", "A cat."),
    ]
    ids, labels = encode_text(processor, turns)
    assert labels.tolist() == reference_labels(processor, turns)
    assert (labels != IGNORE).sum() >= 2 * len("A cat.")
    assert int((ids == processor.image_token_id).sum()) == 2 * processor.rules.layout().num_tokens


REAL = sorted((Path(__file__).parents[2] / "real" / "templates").glob("*.jinja"))


@pytest.mark.parametrize("name", [*all_templates(), *(path.name for path in REAL)])
@pytest.mark.parametrize("kind", ["plain", "thoughts", "tools"])
def test_turns_are_found_alike_where_contents_are_made_once(name: str, kind: str) -> None:
    """Beginnings of a long conversation, rendered from contents that were made once, are what the whole template renders."""
    template = all_templates().get(name) or next(path.read_text() for path in REAL if path.name == name)
    processor = processor_with(template)
    thought = {"reasoning_content": "hm, <image>?"} if kind == "thoughts" else {}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<image>", "n": 1}}}
    picture_part, typed = {"type": "image"}, {"type": "text", "text": " a typed <image> and <|im_end|>\n"}
    messages = [
        {"role": "user", "content": [picture_part, {"type": "text", "text": "What?"}, picture_part, typed]},
        {"role": "assistant", "content": "  A cat, <|im_start|>, <video>\n", **thought},
        {"role": "user", "content": "why? <image> \u00fcn\u00ef \U0001f600 \"q\" {{ x }}"},
        {"role": "assistant", "content": "" if kind == "tools" else [{"type": "text", "text": "so"}],
         **({"tool_calls": [call]} if kind == "tools" else {})},
        *([{"role": "tool", "name": "look", "content": "it is <image>"}] if kind == "tools" else []),
        *([{"role": "assistant", "content": "seen"}] if kind == "tools" else []),
        {"role": "user", "content": [typed, picture_part]},
        {"role": "assistant", "content": "yes", **thought},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}] if kind == "tools" else None
    whole = ChatRenderer(processor, tools)

    def told(render) -> object:
        known = {"template": processor.chat_template, "tokens": added_texts(processor.tokenizer), "where": "it"}
        try:
            return find_replies(render, messages, tools=tools, **known)
        except DataError as error:
            return str(error)

    found = told(lambda given, prompt: whole(given, prompt))
    assert told(whole) == found
    if not isinstance(found, str):
        assert whole.of_beginnings(messages, found[0]) is not whole, "and they were made once"
        assert whole.of_beginnings(messages, found[0] + " ") is whole, "what gives another text is not used"


def test_answers_that_a_template_trims_are_still_labelled() -> None:
    processor = processor_with(GEMMA)
    _, labels = encode_text(processor, [Turn("user", "q"), Turn("assistant", "  yes \n")])
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>"


def test_a_template_that_rewrites_answers_is_refused() -> None:
    processor = processor_with("{% for m in messages %}{{ m['content'][:2] }}{{ eos_token }}{% endfor %}")
    with pytest.raises(DataError, match=r"rewrites assistant turns|renders 0 of"):
        encode_text(
            processor, [Turn("user", "q"), Turn("assistant", "yes"), Turn("assistant", "no")], where="sample 's1'"
        )


def test_a_template_that_drops_messages_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ConfigError, match="do not appear"):
        check_template(tiny_tokenizer(template=None), "{{ messages[0]['content'] }}")


def test_a_typed_placeholder_does_not_become_an_image_slot() -> None:
    processor = processor_with(all_templates()["chatml"])
    turns = [Turn("user", f"{IMAGE_MARK}\nWhy is <image> in your prompt?"), Turn("assistant", "<image> is a tag")]
    ids, _ = encode_text(processor, turns)
    assert int((ids == processor.image_token_id).sum()) == processor.rules.layout().num_tokens
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a <image> b"}]}],
        add_generation_prompt=True,
    )
    assert text.count("<image>") == 1 and "<image>\na < image> b" in text
    assert processor.apply_chat_template([{"role": "user", "content": "typed <image>"}]).count("<image>") == 0


def test_wrapping_a_template_twice_changes_nothing() -> None:
    once = with_images(LLAMA3, "<image>")
    assert with_images(once, "<image>") == once


def sample(turns: list[Turn], images: int = 1) -> Sample:
    return Sample("s1", turns, [picture(i) for i in range(images)], "unit")


def test_encode_sample_counts_placeholders_against_images() -> None:
    processor = processor_with(all_templates()["chatml"])
    with pytest.raises(AlignmentError, match=r"sample 's1' of unit: 1 image placeholders and 2 images"):
        encode_sample(processor, sample([Turn("user", IMAGE_MARK), Turn("assistant", "x")], images=2))


def test_truncation_cuts_text_never_an_image_span() -> None:
    processor = processor_with(all_templates()["chatml"], tokens=16)
    turns = [
        Turn("user", "a"),
        Turn("assistant", "b" * 30),
        Turn("user", f"{IMAGE_MARK} c"),
        Turn("assistant", "d" * 20),
    ]
    whole = encode_sample(processor, sample(turns))
    assert whole.num_images == 1 and not whole.truncated and set(whole.pixels) == {"pixel_values"}
    first = int((whole.input_ids == processor.image_token_id).nonzero()[0])
    inside = encode_sample(processor, sample(turns), max_length=first + 7)
    assert inside.truncated and len(inside) == first and inside.num_images == 0 and not inside.pixels
    after = encode_sample(processor, sample(turns), max_length=len(whole) - 5)
    assert after.num_images == 1 and torch.equal(after.input_ids, whole.input_ids[: len(whole) - 5])
    short = [Turn("user", f"{IMAGE_MARK} c"), Turn("assistant", "d")]
    with pytest.raises(DataError, match=r"sample 's1' of unit: .* do not fit max_length=20"):
        encode_sample(processor, sample(short), max_length=20)


def test_a_sample_without_an_answer_is_named() -> None:
    processor = processor_with(all_templates()["chatml"])
    with pytest.raises(DataError, match="sample 's1' of unit: no token carries loss"):
        encode_sample(processor, sample([Turn("user", "q")], images=0))


def test_the_processor_names_wrong_counts() -> None:
    processor = processor_with(all_templates()["chatml"])
    with pytest.raises(
        AlignmentError,
        match=r"2 <image> placeholders in the text and 1 images; give one image for each.*typed stays text",
    ):
        processor(text="<image> and <image>", images=picture())
    with pytest.raises(AlignmentError, match="text 1 has 0 <image> placeholders and 1 images; give one"):
        processor(text=["<image>", "none"], images=[[picture()], [picture()]])


def test_a_stage_may_read_captions_only(tmp_path: Path) -> None:
    processor = processor_with(shipped_templates()["vicuna"].read_text().rstrip("\n"))
    before = processor.chat_template
    captions = for_training(processor, "caption")
    turns = [Turn("user", f"{IMAGE_MARK}describe <image> it"), Turn("assistant", "a red bar")]
    assert render_prompt(captions, turns, add_generation_prompt=False) == "<s><image>a red bar\n"
    ids, labels = encode_text(captions, turns)
    assert int((ids == processor.image_token_id).sum()) == processor.rules.layout().num_tokens
    learned = processor.tokenizer.decode(labels[labels != IGNORE]).strip()
    assert learned == "a red bar"
    assert processor.chat_template == before and "describe" in render_prompt(processor, turns)
    (tmp_path / "lossy.jinja").write_text("{% for m in messages %}x{% endfor %}")
    with pytest.raises(ConfigError, match="nothing could be learned"):
        for_training(processor, str(tmp_path / "lossy.jinja"))


def test_a_stages_own_template_gets_the_models_options_also_after_saving(tmp_path: Path) -> None:
    """Else a stage would learn what the model is never asked afterwards (Qwen3's thinking switched on)."""
    from mllm.processing.processor import MllmProcessor

    body = "{% for m in messages %}{{ m['content'] }}{% if thinking is defined and not thinking %}!{% else %}?{% endif %}{% endfor %}"
    made = processor_with(body)
    options = {"thinking": False, "loud": True}
    processor = MllmProcessor(
        made.image_processor, made.tokenizer, chat_template=body + "{{ loud }}", template_options=options
    )
    (tmp_path / "stage.jinja").write_text(body)
    processor.save_pretrained(tmp_path / "saved")
    for chosen in (processor, MllmProcessor.from_pretrained(tmp_path / "saved")):
        assert chosen.template_options == options
        assert render_prompt(for_training(chosen, str(tmp_path / "stage.jinja")), [Turn("user", "a")]) == "a!"
        assert render_prompt(for_training(chosen, "caption"), [Turn("user", f"{IMAGE_MARK}a")]) == "<s><image>"


def test_no_content_is_no_text_and_vllm_hands_parts_over_as_they_are() -> None:
    import jinja2

    processor = processor_with("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}")
    call = {"function": {"name": "f", "arguments": {}}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert processor.apply_chat_template(talk) == "user:q;assistant:;"
    tree = jinja2.Environment().parse(
        processor.chat_template
    )  # vLLM reads the template's tree for how content is taken
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert any(isinstance(i, jinja2.nodes.Getitem) and getattr(i.arg, "value", None) == "content" for i in loops)


def test_tokens_are_what_the_template_writes_without_a_second_start() -> None:
    processor = processor_with(LLAMA3.replace("{{ bos_token }}", ""))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)]
    )
    assert processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = processor.apply_chat_template(
        [talk, [talk[0], {"role": "assistant", "content": "a longer answer"}]], tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, return_tensors="pt", processor_kwargs={"padding": True},
    )  # fmt: skip
    for row, text in enumerate(("a", "a longer answer")):
        ids, labels = encode_text(processor, [Turn("user", "q"), Turn("assistant", text)])
        real = found["attention_mask"][row].bool()
        assert torch.equal(found["input_ids"][row][real], ids)
        assert torch.equal(found["assistant_masks"][row][real].bool(), labels != IGNORE)
        assert not found["assistant_masks"][row][~real].any()
    with pytest.raises(ConfigError, match="needs tokenize=True and return_dict=True"):
        processor.apply_chat_template(talk, return_assistant_tokens_mask=True)
