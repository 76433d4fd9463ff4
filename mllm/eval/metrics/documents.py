"""How are answers about documents of several pages scored (DUDE, SlideVQA)?"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.data.templates import literal
from mllm.eval.metrics.anls import AnlsRrc
from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
from mllm.eval.metrics.text import NUMBER_WORDS, collapse, references

_NO_ANSWER = {"", "none", "na", "n/a", "unanswerable", "not answerable", "not-answerable", "unknown"}
_MOST_PARTS = 100


def listed_parts(reply: str) -> list[str]:
    """The entries a reply lists: a list written as such, else lines, else semicolons, else commas."""
    text = reply.strip()
    spelled = literal(text) if len(text) < 10_000 else text
    if isinstance(spelled, list | tuple):
        return [str(entry) for entry in spelled][:_MOST_PARTS]
    for mark in ("\n", ";", ","):
        if mark in text:
            text = text.replace(" and ", f"{mark} ") if mark == "," else text
            parts = [part.strip(" -*\t") for part in text.split(mark)]
            return [part for part in parts if part][:_MOST_PARTS]
    return [text] if text else []


class Dude(AnlsRrc):
    """``meta.answer_type``: ``abstractive``, ``extractive``, ``list/…`` or ``not-answerable``."""

    name = "dude"
    version = "1"
    protocol = (
        "DUDE: ANLS (at least 0.5, whitespace collapsed on both sides of the ratio); list answers matched one to one over the "
        "longer list; not answerable wants an empty reply or a word that says so. A reply's list is read from a written "
        "list, lines, semicolons or commas"
    )
    example = ("yes", {"answer_type": "abstractive"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        kind = str(meta.get("answer_type") or "abstractive")
        denied = collapse(prediction.lower()).strip(" .'\"") in _NO_ANSWER
        if kind == "not-answerable":
            return Score(float(denied), "" if denied else collapse(prediction), "not answerable")
        if "list" in kind:
            return self._list(references(target), listed_parts(prediction))
        return super().score(prediction, target, meta)

    def _list(self, wanted: Sequence[str], given: Sequence[str]) -> Score:
        if not given:
            return Score(0.0, "", "list, empty")
        import numpy as np
        from scipy.optimize import linear_sum_assignment

        table = np.array([[self.compare(goal, part) for part in given] for goal in wanted])
        rows, columns = linear_sum_assignment(-table)
        value = float(table[rows, columns].sum()) / max(len(set(wanted)), len(given))
        return Score(min(1.0, value), "; ".join(given), "list, matched")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        return super().aggregate(items) | group_means(items, "answer_type", self.scale)


_TO_NINETEEN = {word: str(number) for word, number in NUMBER_WORDS.items() if number < 20}
_REPLACED = (
    ("this is ", ""), ("it is ", ""), ("&", ","), ("and", ","), ("percent", ""), ("organisation", "organization"),
    ("because of", ""), ("because", ""), ("due to", ""), ("hours", "hrs"), ("minites", "min"),
)  # fmt: skip
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def slide_tokens(text: str, question: str) -> list[str]:
    """Words of an answer after the published normalisation: lower case, some words and the unit that the question names
    ('how many X', 'which X', small letters) removed, punctuation and articles off, yes/no answers cut to that word, number
    words to nineteen as digits."""
    text = text.lower()
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for cue in ("how many", "which"):
        if cue in question and (words := question[question.find(cue) + len(cue) :].split()):
            text = text.replace(words[0], "")
    text = re.sub(r"\b(a|an|the)\b", " ", text.translate(_PUNCTUATION))
    if (text[:3] == "yes" or text[:2] == "no") and text.split():
        text = text.split()[0]
    return [_TO_NINETEEN.get(word, word) for word in text.split()]


class SlideVqa(Metric):
    """``meta.question``: the question. Headline: F1 of words; ``em`` beside it."""

    name = "slidevqa"
    protocol = "SlideVQA: F1 over the words that its script leaves of answer and reply; EM is equality of those words"
    binary = False
    example = ("5", {"question": "how many?"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        best, question = Score(0.0, collapse(prediction), "no word in common"), str(meta.get("question") or "")
        given = slide_tokens(prediction, question)
        for reference in references(target):
            wanted = slide_tokens(reference, question)
            same = sum((Counter(given) & Counter(wanted)).values())
            if not same:
                continue
            value = 2 * same / (len(given) + len(wanted))
            exact = float(given == wanted)
            if value > (best.value or 0.0):
                best = Score(value, " ".join(given), "equal" if exact else "words in common", {"em": exact})
        return best

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        exact = self.scale * mean(item.score.parts.get("em", 0.0) for item in items)
        return super().aggregate(items) | {"em": exact}
