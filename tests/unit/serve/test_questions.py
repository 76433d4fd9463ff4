"""Does the prompt alone say which question belongs to which image?"""

from __future__ import annotations

import pytest
import torch

from mllm.processing.chat import render_prompt, routing_inputs
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.processor import MllmProcessor
from mllm.processing.questions import pad_questions
from mllm.processing.template import shipped_templates
from mllm.serve.vllm.questions import QuestionReader
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import tiny_tokenizer

SPEC = {"height": 8, "width": 8}
CONVERSATIONS = [
    [Turn("user", f"{IMAGE_MARK}\nwhat is it?")],
    [Turn("user", f"{IMAGE_MARK}{IMAGE_MARK} compare  both,\n please")],
    [Turn("user", f"before {IMAGE_MARK}after")],
    [Turn("user", f"{IMAGE_MARK}")],
    [Turn("user", f"a typed <image> beside {IMAGE_MARK} one")],
    [Turn("system", "be short"), Turn("user", f"{IMAGE_MARK}\nquestion ünï 漢字")],
    [
        Turn("user", f"{IMAGE_MARK}\nfirst?"),
        Turn("assistant", "an answer"),
        Turn("user", f"{IMAGE_MARK}\nsecond, other?"),
        Turn("assistant", "more"),
        Turn("user", "no picture here"),
    ],
]


def processor(template: str) -> MllmProcessor:
    images = MllmImageProcessor(
        encoders={"a": SPEC, "b": SPEC}, layout={"num_tokens": 4, "grid": (2, 2)}, experts=["b"]
    )
    return MllmProcessor(images, tiny_tokenizer(template=template))


@pytest.mark.parametrize("template", sorted(set(shipped_templates()) - {"caption"}))  # captions hold no question
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("as_ids", [False, True])
def test_questions_from_the_prompt_equal_those_from_the_conversation(template, turns, as_ids):
    if template == "plain":  # its turns are not told apart: see the last but one test
        turns = [turn for turn in turns if IMAGE_MARK in turn.content][:1]
    made = processor(template)
    prompt = render_prompt(made, turns)
    count = sum(turn.content.count(IMAGE_MARK) for turn in turns)
    given = made.tokenizer(prompt, add_special_tokens=False)["input_ids"] if as_ids else prompt
    expected = routing_inputs(made, turns, count)["router_input_ids"]
    assert torch.equal(pad_questions(QuestionReader(made)(given, count)), expected)


def test_a_prompt_without_turn_marks_is_one_question():
    made = processor("chatml")
    reader = QuestionReader(made)
    expected = made.tokenizer("what is it?", add_special_tokens=False)["input_ids"]
    assert reader("<image> what is  it?", 1) == [expected]


def test_more_images_than_placeholders_get_empty_questions():
    reader = QuestionReader(processor("chatml"))
    assert reader("<image>a", 3)[1:] == [[], []]
