"""Which question was asked about each image of a rendered prompt? Routers and connectors that read the question need
it."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.processing.protocol import Processor
from mllm.processing.questions import question_text

_PROBES = ("mllm-first-probe", "mllm-answer-probe", "mllm-second-probe")


class QuestionReader:
    """Rendered prompt → for every image, the token ids of the user turn that holds it.

    vLLM hands a model's processor the finished prompt, not the conversation. What stands around a user's turn is
    therefore learned from the chat template itself, by rendering a probe conversation. The result equals
    `mllm.processing.chat.routing_inputs` on the conversation, except where turns are told apart by white space only
    (template ``plain``, raw prompts): there the whole prompt counts as one turn.
    """

    def __init__(self, processor: Processor):
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.before, self.after = turn_marks(processor)

    def __call__(self, prompt: str | Sequence[int], num_images: int) -> list[list[int]]:
        """Token ids of ``num_images`` questions; [] where there is no text (or no placeholder)."""
        known: dict[str, list[int]] = {"": []}
        texts = self.texts(prompt, num_images)
        for text in texts:
            if text not in known:
                known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [known[text] for text in texts]

    def texts(self, prompt: str | Sequence[int], num_images: int) -> list[str]:
        """The questions themselves; "" where there is no text (or no placeholder)."""
        text = prompt if isinstance(prompt, str) else self._decode(prompt)
        questions: list[str] = []
        position = text.find(self.image_token)
        while position >= 0 and len(questions) < num_images:
            questions.append(question_text(self.turn_around(text, position), self.image_token))
            position = text.find(self.image_token, position + len(self.image_token))
        return questions + [""] * (num_images - len(questions))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def turn_around(self, prompt: str, position: int) -> str:
        """The user turn that contains character ``position``."""
        begin = prompt.rfind(self.before, 0, position) if self.before else -1
        begin = begin + len(self.before) if begin >= 0 else 0
        ends = [prompt.find(mark, position) for mark in (self.after, self.before) if mark]
        return prompt[begin : min([end for end in ends if end >= 0], default=len(prompt))]


def turn_marks(processor: Processor) -> tuple[str, str]:
    """What the chat template writes right before and right after what a user says; empty where nothing is constant."""
    first, answer, second = _PROBES
    turns = [("user", first), ("assistant", answer), ("user", second)]
    text = _render(processor, turns)
    if text is None:
        return "", ""
    before = [text[: text.index(first)], text[text.index(answer) + len(answer) : text.index(second)]]
    after = [text[text.index(first) + len(first) : text.index(answer)], text[text.index(second) + len(second) :]]
    twice = _render(processor, [("user", first), ("user", second)])  # many templates refuse this
    if twice is not None:
        shorter = _common_start([*after, twice[twice.index(first) + len(first) : twice.index(second)]])
        after = [shorter] if shorter.strip() else after
    led = _render(processor, [("system", answer), ("user", first)])
    if led is not None:
        before.append(led[: led.index(first)])
    marks = _common_start([piece[::-1] for piece in before])[::-1], _common_start(after)
    return marks if all(mark.strip() for mark in marks) else ("", "")


def _common_start(texts: Sequence[str]) -> str:
    """The longest string that all texts begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:length]


def _render(processor: Processor, turns: Sequence[tuple[str, str]]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = processor.tokenizer.apply_chat_template(
            messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template refuses what it does not know, with whatever exception it likes
        return None
    return text if all(content in text for _, content in turns) else None
