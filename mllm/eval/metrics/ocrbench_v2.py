"""How are OCRBench v2's questions scored whose rule needs no parser of tables, no word net and no boxes of every word?"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean, means_by
from mllm.eval.metrics.text import collapse, edit_distance, references

_SHORT_ANSWERS = (
    "APP agent en", "ASCII art classification en", "math QA en", "reasoning VQA en", "science QA en", "text recognition en",
    "document classification en", "cognition VQA en", "diagram QA en", "cognition VQA cn", "reasoning VQA cn",
)  # fmt: skip
_KEYS = ("key information extraction en", "key information mapping en", "key information extraction cn")
_FORMULAS = ("formula recognition en", "formula recognition cn")
_HAND, _COUNT, _PLACE, _BOX = (
    "handwritten answer extraction cn", "text counting en", "VQA with position en", "text grounding en",
)  # fmt: skip
TYPES = (*_SHORT_ANSWERS, *_KEYS, *_FORMULAS, _HAND, _COUNT, _PLACE, _BOX)
_ABILITY = {
    "text recognition en": "recognition", _BOX: "detection", _PLACE: "detection", _KEYS[0]: "relation extraction",
    _KEYS[1]: "relation extraction", _KEYS[2]: "relation extraction", _HAND: "relation extraction",
    "formula recognition en": "element parsing", "formula recognition cn": "element parsing", "math QA en": "calculation",
    _COUNT: "calculation", "document classification en": "understanding", "cognition VQA en": "understanding",
    "diagram QA en": "understanding", "cognition VQA cn": "understanding",
}  # fmt: skip
_JOINED = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")
_BOX_TEXT = re.compile(r"[(\[]\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*[)\]]")
_PAIR = re.compile(r"[\"']?(\w[\w ]{0,60})[\"']?\s?[:=]\s?[\"']?([^\n,\"'{}]{1,200})")
_READ, _MOST = 8_000, 256


def held(reply: str, answer: str, *, chinese: bool = False, case: bool = False) -> float:
    """1 when the reply holds a short answer; a long one (five words, or four parts of a Chinese list) is compared by ANLS."""
    left, right = (text.strip().replace("\n", " ") for text in (reply, answer))
    if not case:
        left, right = left.lower(), right.lower()
    if chinese:
        left, right = left.replace(" ", ""), right.replace(" ", "")
    if len(right.split(",")) < 4 if chinese else len(right.split()) < 5:
        return float(right in left)
    length = max(len(left), len(right))
    value = 1 - edit_distance(left, right) / length if length else 1.0
    return value if value >= 0.5 else 0.0


def key_values(text: str) -> dict[str, str]:
    """The mapping that a reply writes: JSON or a Python literal (in a code fence or not), else ``key: value`` pairs."""
    fenced = re.search(r"```(?:python|json)?\n(.{0,8000}?)\n```", text, re.DOTALL | re.IGNORECASE)
    content = (fenced[1] if fenced else text).strip()[:_READ]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(content)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in found.items()}
    return {key.strip(): value.strip() for key, value in _PAIR.findall(content)}


def keys_f1(reply: Mapping[str, str], wanted: Mapping[str, Any]) -> float:
    """Share of all keys of either side whose values are equal without case and spaces."""
    keys = {*reply, *wanted}

    def plain(value: Any) -> str:
        return str(value).lower().replace("\n", " ").replace(" ", "")

    same = sum(key in reply and key in wanted and plain(reply[key]) == plain(wanted[key]) for key in keys)
    return same / len(keys) if keys else 1.0


def box_overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two ``x1, y1, x2, y2`` boxes; 0 where there is none."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(0.0, width) * max(0.0, height)
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - inside
    return max(0.0, inside / whole) if whole > 0 else 0.0


class OcrBenchV2(Metric):
    """``meta``: ``type`` (one of `TYPES`), ``eval`` (``multiple choice``, ``case sensitive``, ``exact match``, ``regression`` or empty),
    ``bbox``, ``question``. Headline: mean over all samples; English and Chinese and each ability beside it."""

    name = "ocrbench_v2"
    protocol = (
        "OCRBench v2, the 20 of its 31 question types whose rule is text, numbers, keys or one box: short answers by substring, "
        "long ones by ANLS, keys by F1, counts by relative error, boxes by overlap. Tables, documents, charts, whole pages, "
        "translations and spotting are not scored here, so this is not the benchmark's total"
    )
    binary = False
    example = (["yes"], {"type": "cognition VQA en", "eval": ""})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        kind, answers = str(meta.get("type")), references(target)
        if kind not in TYPES:
            raise DataError(f"type {kind!r}: its rule is not here; those that are: {', '.join(TYPES)}")
        way = str(meta.get("eval") or "")
        shown = collapse(prediction)[:200]
        if kind in _KEYS:
            return Score(self._keys(prediction, answers[0]), shown, "keys")
        if kind in _FORMULAS:
            return Score(self._formula(prediction, answers, kind), shown, "formula, substring")
        if kind == _HAND:
            return self._handwritten(prediction, answers[0], meta)
        if kind == _COUNT:
            return self._count(prediction, answers, way)
        if kind == _BOX:
            boxes = [tuple(map(int, found)) for found in _BOX_TEXT.findall(prediction[-_READ:])]
            boxes = [box for box in boxes if max(box) <= 1000]
            if not boxes:
                return Score(None, "", "no box")
            return Score(box_overlap(boxes[-1], self._box(answers)), str(boxes[-1]), "overlap")
        if kind == _PLACE:
            return self._placed(prediction, answers, meta)
        if way == "multiple choice":
            letters = "".join(letter for letter in prediction if letter.isalpha())
            return Score(float(letters == answers[0]), letters[:40], "letters of the reply")
        case, chinese = way == "case sensitive", kind.endswith("cn")
        value = max(held(prediction, answer, chinese=chinese and not case, case=case) for answer in answers)
        return Score(value, shown, "held" if value in (0.0, 1.0) else "similar")

    @staticmethod
    def _keys(prediction: str, answer: str) -> float:
        wanted = key_values(answer) if not answer.strip().startswith("{") else ast.literal_eval(answer)
        lists = [value if isinstance(value, list) else [value] for value in wanted.values()]
        pairs = key_values(prediction)
        ways = itertools.islice(itertools.product(*lists), _MOST)
        return max((keys_f1(pairs, dict(zip(wanted, way))) for way in ways), default=0.0)

    @staticmethod
    def _formula(prediction: str, answers: Sequence[str], kind: str) -> float:
        def plain(text: str) -> str:
            if kind.endswith("cn"):
                text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
            return text.strip().replace("\n", " ").replace(" ", "")

        return float(any(plain(answer) in plain(prediction) for answer in answers))

    @staticmethod
    def _handwritten(prediction: str, answer: str, meta: Mapping[str, Any]) -> Score:
        if "简答" in str(meta.get("question") or ""):
            raise DataError("an essay question (简答): scored by BLEU and METEOR in the benchmark, not here")
        forms = [mark.join(answer) for mark in _JOINED] if len(answer) > 1 else [answer]
        return Score(float(any(form in prediction for form in forms)), collapse(prediction)[:200], "held")

    @staticmethod
    def _count(prediction: str, answers: Sequence[str], way: str) -> Score:
        if way != "regression":
            return Score(
                float(any(answer.lower().strip() in prediction for answer in answers)),
                collapse(prediction)[:200],
                "held",
            )
        found = re.search(r"\d{1,9}", prediction)
        if found is None:
            return Score(None, "", "no number")
        number, best = int(found[0]), 0.0
        for answer in answers:
            wanted = int(answer)
            if 0 < number < 2 * wanted:
                best = max(best, 1 - abs(number - wanted) / wanted)
        return Score(best if best > 0.5 else 0.0, found[0], "relative error")

    def _placed(self, prediction: str, answers: Sequence[str], meta: Mapping[str, Any]) -> Score:
        pairs = key_values(prediction)
        content = max((held(pairs["answer"], answer) for answer in answers), default=0.0) if "answer" in pairs else 0.0
        numbers = [int(number) for number in re.findall(r"-?\d{1,6}", pairs.get("bbox", ""))]
        overlap = (
            box_overlap(numbers, [float(v) for v in meta.get("bbox") or ()])
            if len(numbers) == 4 and meta.get("bbox")
            else 0.0
        )
        return Score(0.5 * content + 0.5 * overlap, pairs.get("answer", ""), "answer and box")

    @staticmethod
    def _box(answers: Sequence[str]) -> list[float]:
        try:
            numbers = [
                float(number)
                for number in (answers if len(answers) == 4 else re.findall(r"-?\d+(?:\.\d+)?", answers[0]))
            ]
        except ValueError:
            numbers = []
        if len(numbers) != 4:
            raise DataError(f"target {list(answers)!r} is no box of four numbers")
        return numbers

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        totals = means_by(((name, item.value) for item in items for name in _counted_under(item)), self.scale)
        return {"score": self.scale * mean(item.value for item in items)} | totals


def _counted_under(item: Scored) -> tuple[str, ...]:
    """A question's language, its ability in that language, and its kind."""
    kind = str(item.meta.get("type"))
    language = kind[-2:]
    return language, f"{language}/{_ABILITY.get(kind, 'reasoning')}", kind
