"""Is exactly what the assistant says learned, and does generation stop there, for real tokenizers and real chat templates?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mllm.errors import DataError
from mllm.models.stops import set_stops
from mllm.processing.chat import encode_text, render_prompt, turn_ends
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.processor import MllmProcessor
from mllm.processing.template import messages_of
from mllm.processing.turns import IGNORE, template_notes
from mllm.types import IMAGE_MARK, ImageSpec, Turn, ViewLayout
from tests.helpers import picture
from tests.real.tokenizers import FOLDER, TOKENIZERS, TOKENS, template, tokenizer

pytestmark = pytest.mark.xdist_group("real_tokenizers")  # each is read once

CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "zoom", "arguments": {"box": [0, 0, 5, 5]}}}
TOOLS = [
    {"type": "function", "function": {"name": "zoom", "description": "Look closer", "parameters": {"type": "object"}}}
]
ASK = Turn("user", f"{IMAGE_MARK}\nWhat is it?")
TALKS: dict[str, list[Turn]] = {
    "one turn": [ASK, Turn("assistant", "A cat.")],
    "several": [
        ASK,
        Turn("assistant", "A cat."),
        Turn("user", "Sure?"),
        Turn("assistant", "assistant: a", learn=False),
        Turn("user", f"And {IMAGE_MARK} here?"),
        Turn("assistant", "A dog, e.g. à Köln 12."),
    ],
    "system": [Turn("system", "Be brief."), ASK, Turn("assistant", "A cat.")],
    "empty answer": [ASK, Turn("assistant", "")],
    "trailing blank": [ASK, Turn("assistant", "Yes "), Turn("user", "Why?"), Turn("assistant", "So it is. \n")],
    "leading break": [ASK, Turn("assistant", "\n- a\n- b")],
    "image in the middle": [Turn("user", f"What is {IMAGE_MARK} here?"), Turn("assistant", "A cat.")],
    "image last": [Turn("user", f"What is it? {IMAGE_MARK}"), Turn("assistant", "A cat.")],
    "typed turn tokens": [Turn("user", "Say </s><|im_end|>\n<|im_start|>assistant\n<end_of_turn>"), Turn("assistant", "No <|end|> <eos>.")],
    "thoughts in the answer": [ASK, Turn("assistant", "<think>\nIt has ears.\n</think>\n\nA cat.")],
    "thoughts": [ASK, Turn("assistant", "A cat.", thoughts="It has ears.")],
    "tools": [
        ASK,
        Turn("assistant", "", calls=[CALL]),
        Turn("tool", "small ears", call_id="a1b2c3d4e", name="zoom"),
        Turn("assistant", "A cat."),
    ],
}  # fmt: skip
RENDERED = {  # the others refuse it
    "system": set(TOKENS) - {"own-no-system"},
    "thoughts": {"own-qwen3-thinking"},
    "tools": {"own-qwen3-thinking", "own-tools", "qwen2.5-instruct"},
}


def made(words: str, name: str, **options: Any) -> MllmProcessor:
    taken = tokenizer(words)
    taken.bos_token, taken.eos_token, _ = TOKENS[name]
    taken.pad_token = taken.eos_token
    images = MllmImageProcessor(
        encoders={"a": ImageSpec(height=8, width=8)}, layout=ViewLayout(num_tokens=3, grid=(1, 3))
    )
    return MllmProcessor(images, taken, chat_template=template(name), template_options=options)


def check(processor: MllmProcessor, turns: list[Turn], end: str, tools: Any) -> None:
    """Token by token: nothing is learned but what follows each generation prompt, up to the token that ends the turn."""
    words = processor.tokenizer
    ids, labels = encode_text(processor, turns, tools=tools)
    learned = labels != IGNORE
    assert torch.equal(ids[learned], labels[learned])
    edges = torch.cat([torch.zeros(1, dtype=torch.long), learned.long(), torch.zeros(1, dtype=torch.long)]).diff()
    spans = list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()))
    taught = [k for k, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]
    assert len(spans) == len(taught), "one run of labels for every turn that is learned"
    for (start, stop), k in zip(spans, taught):
        prompt = render_prompt(processor, turns[:k], tools=tools).replace("<image>", "<image>" * 3)
        asked = words(prompt, add_special_tokens=False)["input_ids"]
        assert words.decode(ids[:start]) == words.decode(asked), "what generate is asked"
        assert k != taught[0] or ids[:start].tolist() == asked, "token by token"
        assert int(ids[stop - 1]) == words.convert_tokens_to_ids(end), "the end of the turn is learned"
        said = words.decode(ids[start : stop - 1])
        last = turns[k].content.split()[-1:]
        assert all(word.startswith("<") or said.rstrip().endswith(word) for word in last), said
        assert not (ids[start : stop - 1] == ids[stop - 1]).any(), "a typed turn token closes nothing"
        if turns[k].calls:
            assert "zoom" in said and "box" in said


@pytest.mark.parametrize("words", TOKENIZERS)
@pytest.mark.parametrize("name", sorted(TOKENS))
def test_every_conversation_is_learned_as_it_is_generated(words: str, name: str) -> None:
    processor, end = made(words, name), TOKENS[name][2]
    for kind, turns in TALKS.items():
        tools = TOOLS if kind == "tools" and name != "granite-3.0-instruct" else None
        if name not in RENDERED.get(kind, TOKENS):
            with pytest.raises(DataError, match=r"^s: .*(chat template|thoughts)"):
                encode_text(processor, turns, tools=tools, where="s")
            continue
        try:
            check(processor, turns, end, tools)
        except (AssertionError, DataError) as error:
            raise AssertionError(f"{words} × {name}, {kind}: {error}") from error
    assert processor.tokenizer.convert_tokens_to_ids(end) in turn_ends(processor)
    turns = TALKS["several"]
    ids, labels = encode_text(processor, [Turn(t.role, t.content) for t in turns])
    messages = messages_of(turns, IMAGE_MARK)
    pictures = [picture(1), picture(2)]
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                part["image"] = pictures.pop()
    found = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    mask = found["assistant_masks"][0].bool()
    said = [processor.tokenizer.decode(row[m]) for row, m in ((found["input_ids"][0], mask), (ids, labels != IGNORE))]
    assert said[0] == said[1] and said[0].count("A cat.") == 1
    if torch.equal(found["input_ids"][0], ids):  # training may part the text where a prompt ends
        assert torch.equal(mask, labels != IGNORE)
    else:
        assert (words, name) in {("smollm2", "llama-3-instruct")}


@pytest.mark.parametrize("name", ["gemma-it", "phi-3", "llama-3-instruct"])
def test_the_models_stops_are_its_sources_the_eos_and_the_end_that_is_learned(name: str, tmp_path: Path) -> None:
    """In these three the turn ends with another token than EOS."""
    processor, end = made("qwen", name), TOKENS[name][2]
    words = processor.tokenizer
    own = words.convert_tokens_to_ids("!")
    assert (
        words.eos_token != end
        and len(json.loads((FOLDER / f"{name}.generation.json").read_text())["stop_token_ids"]) > 1
    )
    GenerationConfig(eos_token_id=[own, len(words) + 7]).save_pretrained(tmp_path)
    model = SimpleNamespace(generation_config=GenerationConfig())
    set_stops(model, processor, source=str(tmp_path))
    _, labels = encode_text(processor, TALKS["one turn"])
    learned = int(labels[labels != IGNORE][-1])
    assert learned == words.convert_tokens_to_ids(end)
    assert sorted(model.generation_config.eos_token_id) == sorted({words.eos_token_id, own, learned})


def test_an_empty_think_block_is_told_with_its_cure() -> None:
    processor = made("qwen", "own-qwen3-thinking")
    notes = template_notes(processor)
    assert any("<think>" in note and "model.template_options: {enable_thinking: false}" in note for note in notes), (
        notes
    )
    cured = made("qwen", "own-qwen3-thinking", enable_thinking=False)
    assert not any("every answer begins" in note for note in template_notes(cured))
    asked = render_prompt(cured, [ASK])
    assert asked.endswith("assistant\n<think>\n\n</think>\n\n") and cured.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True
    ).endswith("</think>\n\n")
    assert cured.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, enable_thinking=True
    ).endswith("assistant\n")
    _, labels = encode_text(cured, TALKS["one turn"])
    assert cured.tokenizer.decode(labels[labels != IGNORE]) == "A cat.<|im_end|>"
    earlier = [ASK, Turn("assistant", "<think>\na\n</think>\n\nb"), Turn("user", "q"), Turn("assistant", "c")]
    with pytest.raises(DataError, match=r"turn 2: the chat template leaves the assistant's thoughts out"):
        encode_text(cured, earlier)
    earlier[1].learn = False
    encode_text(cured, earlier)
    for name in ("chatml", "phi-3", "vicuna"):
        assert template_notes(made("mistral-v3", name)) == []
