"""What is a judge asked, and how is its verdict read?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, field_validator

from mllm import assets
from mllm.config import StrictModel, read_yaml, validate
from mllm.errors import ConfigError
from mllm.eval.data.templates import check_template, clean, render
from mllm.eval.metrics import build_metric
from mllm.eval.refusals import is_refusal
from mllm.types import Turn


class JudgePrompt(StrictModel):
    """One way to ask a judge. ``template`` is Jinja over ``question``, ``answer`` (the first reference), ``answers``,
    ``prediction`` (thoughts left out), ``options``, ``category`` and the task's meta values; for ``preference`` also
    ``first`` and ``second``, the two answers in the order in which they are shown."""

    name: str
    version: int = Field(ge=1)
    """Raised with every change that can change a verdict."""
    source: str
    """Whose rule this follows, and how far the wording is theirs."""
    reads: Literal["binary", "grade", "rating", "preference", "extract"]
    """binary: right or wrong. grade: a number from 0 to 1. rating: two numbers from 1 to 10, the reference's and the
    model's. preference: which of two answers is better, asked in both orders. extract: the answer in the reply, which
    ``metric`` then scores."""
    template: str
    system: str | None = None
    metric: str | dict[str, Any] | None = None
    """extract: the rule that scores what was extracted."""
    max_new_tokens: int = Field(default=256, ge=1)
    note: str = ""

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        check_template(value)
        return value

    @property
    def label(self) -> str:
        """Name and version, with six digits over the wording, as printed beside a number."""
        wording = hashlib.sha256(repr([self.template, self.system, self.reads, self.metric]).encode()).hexdigest()[:6]
        return f"{self.name} v{self.version} ({wording})"

    def turns(self, row: Mapping[str, Any], *, swapped: bool = False) -> list[Turn]:
        """The conversation that asks for a verdict on one prediction row. Raises `DataError` when the template names
        what the row has not."""
        targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
        answers = [str(entry["answer"] if isinstance(entry, dict) else entry) for entry in targets]
        prediction = str(row["output"]).rpartition("</think>")[2].strip()
        pair = (prediction, answers[0]) if swapped else (answers[0], prediction)
        values = {
            "options": [], **row.get("meta", {}), "question": row["question"], "answer": answers[0], "answers": answers,
            "prediction": prediction, "category": row.get("category"), "first": pair[0], "second": pair[1],
        }  # fmt: skip
        system = [Turn("system", self.system)] if self.system else []
        return [*system, Turn("user", clean(render(self.template, values)))]


@dataclass(frozen=True)
class Verdict:
    """What a judge's reply says. value: None when it says nothing that can be read; ``rule`` then is why (``refused``,
    ``no verdict``)."""

    value: float | None
    rule: str
    parts: Mapping[str, float] = field(default_factory=dict)
    extracted: str = ""


_SCORE = re.compile(r'"?score"?\s*[:=]\s*"?(-?\d{1,3}(?:\.\d{1,4})?)', re.IGNORECASE)
_WORD = re.compile(r"\b(yes|no|correct|incorrect|right|wrong|true|false|unclear)\b", re.IGNORECASE)
_NEGATED = re.compile(r"\bnot\s+(?:quite\s+|fully\s+|entirely\s+)?(?:correct|right|true)\b", re.IGNORECASE)
_RIGHT = {"yes", "correct", "right", "true", "1"}
_NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,4})?(?![\w%])")
_BETTER = {"A>>B": -1.0, "A>B": -0.5, "A=B": 0.0, "B>A": 0.5, "B>>A": 1.0}
_READ = 8_000


def read_verdict(prompt: JudgePrompt, reply: str) -> Verdict:
    """A judge's reply as a verdict. What is prose without one is read as none, never guessed."""
    text = reply.rpartition("</think>")[2].strip()[-_READ:]
    if not text:
        return Verdict(None, "empty")
    verdict = _READERS[prompt.reads](text)
    if verdict.value is None and verdict.rule == "no verdict" and is_refusal(text):
        return Verdict(None, "refused")
    return verdict


def _binary(text: str) -> Verdict:
    if found := _SCORE.findall(text):
        number = float(found[-1])
        return Verdict(number, "score") if number in (0.0, 1.0) else Verdict(None, "score is neither 0 nor 1")
    bare = text.strip(" .*`\"'\n").lower()
    if bare in ("0", "1"):
        return Verdict(float(bare), "number alone")
    words = [word.lower() for word in _WORD.findall(_NEGATED.sub("incorrect", text))]
    first = _WORD.match(text.lstrip("*`\"'[( "))
    if first and not _NEGATED.match(text):
        return Verdict(float(first[0].lower() in _RIGHT), "first word")
    kinds = {word in _RIGHT for word in words}
    return Verdict(float(kinds.pop()), "only verdict word") if len(kinds) == 1 else Verdict(None, "no verdict")


def _grade(text: str) -> Verdict:
    found = _SCORE.findall(text) or _NUMBER.findall(text)
    if not found:
        return Verdict(None, "no verdict")
    number = float(found[-1])
    return Verdict(number, "grade") if 0 <= number <= 1 else Verdict(None, "grade outside 0 to 1")


def _rating(text: str) -> Verdict:
    for line in (text.split("\n")[0], text.split("\n")[-1]):
        numbers = [float(each) for each in _NUMBER.findall(line)]
        if len(numbers) == 2 and all(1 <= number <= 10 for number in numbers):
            parts = {"reference": numbers[0], "model": numbers[1]}
            return Verdict(numbers[1] / numbers[0], "two ratings", parts)
    return Verdict(None, "no verdict")


def _preference(text: str) -> Verdict:
    found = re.findall(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]", text)
    return Verdict(_BETTER[found[-1]], found[-1]) if found else Verdict(None, "no verdict")


def _extract(text: str) -> Verdict:
    answer = text.split("\n")[0].removeprefix("Extracted answer:").strip(" *`\"'")
    return Verdict(0.0, "extracted", extracted=answer) if answer else Verdict(None, "no verdict")


_READERS: dict[str, Callable[[str], Verdict]] = {
    "binary": _binary, "grade": _grade, "rating": _rating, "preference": _preference, "extract": _extract,
}  # fmt: skip


def load_judge_prompt(name: str) -> JudgePrompt:
    """A judge's prompt by name (``eval/judges``) or path. Raises `UnknownName`, `ConfigError`."""
    path = assets.find("eval/judges", name, kind="judge prompt")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    prompt = validate(JudgePrompt, data, where=path.name)
    if (prompt.reads == "extract") != (prompt.metric is not None):
        raise ConfigError(f"{path.name}: reads extract and metric belong together; give both or neither")
    if prompt.metric is not None:
        build_metric(prompt.metric)
    return prompt
