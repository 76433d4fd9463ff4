"""Which option's letter does a reply name?"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
from mllm.eval.metrics.choosing import LETTERS, choose
from mllm.eval.metrics.text import collapse, references
from mllm.eval.metrics.vqa import strip_punctuation


def option_texts(meta: Mapping[str, Any]) -> dict[str, str]:
    """Letter → option text of a sample's ``options``; empty when it has none."""
    options = meta.get("options") or []
    if len(options) > len(LETTERS):
        raise DataError(f"{len(options)} options; letters reach only {len(LETTERS)}")
    return {LETTERS[position]: str(text) for position, text in enumerate(options)}


def gold_letters(target: Any, options: Mapping[str, str]) -> set[str]:
    """Accepted letters of a target: letters (``"B"``, ``"(B)"``, ``"b."``), or an option's whole text."""
    accepted: set[str] = set()
    for reference in references(target):
        bare = reference.strip().strip("().:").strip().upper()
        if len(bare) == 1 and bare in (options or LETTERS):
            accepted.add(bare)
        else:
            accepted.update(
                letter for letter, text in options.items() if collapse(text).lower() == collapse(reference).lower()
            )
    if not accepted:
        raise DataError(f"target {target!r} is neither a letter nor one of the options {list(options.values())}")
    return accepted


class _LetterMetric(Metric):
    """Scores 1 when the letter read from the reply is a gold letter; None when no letter can be read."""

    chooses = True

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        """(letter or None, the rule that decided)."""
        raise NotImplementedError

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        options = option_texts(meta)
        gold = gold_letters(target, options)
        letter, rule = self.read(prediction, options)
        return Score(None, "", rule) if letter is None else Score(float(letter in gold), letter, rule)


class Letter(_LetterMetric):
    name = "letter"
    version = "2"
    protocol = (
        "our letter rule: the reply is a letter or one option's text, or says its choice ('answer is X', 'X is "
        "correct', 'Final answer: X', a letter by itself); a correction replaces what stood before it; what is denied, "
        "offered together (A or C), asked or supposed is no choice, and without one choice it is unparsed, never "
        "guessed. Thoughts are not read; of a reply over 10 000 characters, the first 2 000 and the last 8 000 are"
    )

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        return choose(reply, options)


_PHRASES = (
    *(
        f"{start} is"
        for start in (
            "the answer", "answer", "the correct answer", "correct answer", "the best answer", "best answer",
            "the correct option", "correct option", "the best option", "best option", "the choice", "choice",
            "the correct choice", "correct choice", "my answer", "my choice",
        )
    ),
    "i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


class LetterRanked(_LetterMetric):
    name = "letter_ranked"
    protocol = (
        "lmms-eval's ranked extractor (MMStar, VideoMME): start, end, answer phrase, (X), X., X:, X), 'X ', any; "
        "the later place wins a tie; parts of words count ('A cat' is A)"
    )

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        legal = list(options) or list("ABCDEFGH")
        bare = reply.strip()
        for mark in ",.!?;:'\"":
            bare = bare.strip(mark)
        text, bare = f" {bare} ", bare.strip()
        found: list[tuple[int, int, str, str]] = []  # rank, position, letter, rule
        for rank, rule, pattern in (
            (6, "(X)", "({})"),
            (5, "X.", "{}."),
            (4, "X:", "{}:"),
            (3, "X)", "{})"),
            (2, "X ", "{} "),
        ):
            for letter in legal:
                if (place := text.rfind(pattern.format(letter))) >= 0:
                    found.append((rank, place, letter, rule))
        lowered = text.lower()
        for phrase in _PHRASES:
            if (place := lowered.find(phrase)) >= 0:
                after = [(text.find(letter, place + len(phrase)), letter) for letter in legal]
                found.extend((7, where, letter, f"after {phrase!r}") for where, letter in after if where >= 0)
        for letter in legal:
            if bare.startswith(letter) and not bare[1:2].isalpha():
                found.append((10, 0, letter, "start"))
            if bare.endswith(letter) and not bare[-2:-1].isalpha():
                found.append((9, len(text) - 1, letter, "end"))
        if not found:
            found = [(0, text.rfind(letter), letter, "any occurrence") for letter in legal if letter in text]
        if not found:
            return None, "no letter"
        best = max(found, key=lambda candidate: candidate[:2])
        return best[2], best[3]


class LetterScienceQa(_LetterMetric):
    name = "letter_scienceqa"
    protocol = "LLaVA's ScienceQA rule: the letter alone, 'X. …', or exactly one 'The answer is X.'"

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        legal = set(options) or set("ABCDE")
        if reply in legal:
            return reply, "letter alone"
        if len(reply) >= 3 and reply[0] in legal and reply[1:3] == ". ":
            return reply[0], "X. and text"
        found = re.findall(r"The answer is ([A-Z]).", reply)
        if len(found) == 1:
            return (found[0], "The answer is X.") if found[0] in legal else (None, "letter is no option")
        return None, "no letter" if not found else "several 'The answer is'"


class LetterFirst(_LetterMetric):
    name = "letter_first"
    protocol = "SEED as lmms-eval scores it: the first character of the stripped reply, any case"

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        first = reply.strip()[:1].upper()
        return (first, "first character") if first else (None, "empty")


class LetterAi2d(_LetterMetric):
    name = "letter_ai2d"
    protocol = "AI2D as lmms-eval scores it: 'X.' at the start, else the whole reply without punctuation, any case"

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        if found := re.match(r"\s*([A-Z])\.", reply):
            return found[1], "X. at the start"
        bare = reply.strip().translate(str.maketrans("", "", string.punctuation)).upper()
        return (bare, "whole reply") if len(bare) == 1 and bare in LETTERS else (None, "no letter")


_VIDEOMME_PREFIXES = (  # the last two are four in the published list, whose missing commas join them
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip


class LetterVideoMme(_LetterMetric):
    name = "letter_videomme"
    version = "2"
    protocol = (
        "VideoMME's own rule: its four prefixes ('The answer is' and three like it) removed, then the first A-D "
        "anywhere, so 'Answer: B' is A"
    )

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        text = reply.strip()
        for prefix in _VIDEOMME_PREFIXES:
            text = text.replace(prefix, "")
        found = re.search(r"[ABCD]", text)
        if found is None:
            return None, "over ten words, no letter" if len(text.split()) > 10 else "no letter"
        return found[0], "first of A-D anywhere"


class LetterMvBench(_LetterMetric):
    name = "letter_mvbench"
    protocol = "MVBench as lmms-eval scores it: 'X. …', else VQA punctuation and the first standalone A-E of any case"

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        if found := re.match(r"([A-E])\.\s*.+$", reply.strip(), re.IGNORECASE):
            return found[1].upper(), "X. and text"
        text = strip_punctuation(reply.replace("\n", " ").replace("\t", " ").strip())
        found = re.search(r"\b([A-E])\b", text, re.IGNORECASE)
        return (found[1].upper(), "first standalone letter") if found else (None, "no letter")


class LetterCvBench(_LetterMetric):
    """CV-Bench counts each source by itself: score = ½ · (mean of ADE20K and COCO) + ½ · Omni3D."""

    name = "letter_cvbench"
    protocol = "CV-Bench: first letter of the reply, bracket or not; half the mean of ADE20K and COCO plus half Omni3D"
    is_mean = False

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        found = re.match(r"\s*+\(?\s*+([A-Za-z])", reply)
        return (found[1].upper(), "leading letter") if found else (None, "no letter")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        source = str(item.meta.get("source"))
        flat, deep = (float(source.lower() == name) for name in ("ade20k", "omni3d"))
        coco = float(source.lower() == "coco")
        return "", (1.0, item.value, flat, flat * item.value, coco, coco * item.value, deep, deep * item.value)

    def headline(self, parts: np.ndarray) -> float:
        count, total, *each = parts.sum(axis=0)
        (ade, coco, deep) = (right / asked if asked else None for asked, right in zip(each[::2], each[1::2]))
        flat = [value for value in (ade, coco) if value is not None]
        halves = [mean(flat), *([deep] if deep is not None else [])] if flat else ([deep] if deep is not None else [])
        return self.scale * float(mean(halves) if halves else total / count if count else float("nan"))

    def aggregate(self, items: list[Scored]) -> dict[str, float]:  # type: ignore[override]
        by_source = group_means(items, "source", self.scale)
        parts = {name.lower(): value for name, value in by_source.items()}
        flat = [parts[name] for name in ("ade20k", "coco") if name in parts]
        halves = ([sum(flat) / len(flat)] if flat else []) + ([parts["omni3d"]] if "omni3d" in parts else [])
        if not halves:
            return Metric.aggregate(self, items)
        result = {"score": sum(halves) / len(halves)}
        if flat:
            result["2D"] = sum(flat) / len(flat)
        if "omni3d" in parts:
            result["3D"] = parts["omni3d"]
        return result | by_source


_MMEREALWORLD_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


class LetterMmeRealWorld(_LetterMetric):
    """Headline: percent of all questions; ``perception`` and ``reasoning``, and each of their tasks, beside it."""

    name = "letter_mmerealworld"
    protocol = (
        "MME-RealWorld's own rule: its eight prefixes removed, then the first A-E anywhere, else a lone small letter; an "
        "empty reply, which the published script takes for A, is unparsed"
    )

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        text = reply.strip()
        for prefix in _MMEREALWORLD_PREFIXES:
            text = text.replace(prefix, "")
        if found := re.search("[ABCDE]", text):
            return found[0], "first of A-E anywhere"
        bare = text.strip().strip("()").lower()
        return (bare.upper(), "small letter alone") if len(bare) == 1 and bare in "abcde" else (None, "no letter")

    def aggregate(self, items: list[Scored]) -> dict[str, float]:  # type: ignore[override]
        return Metric.aggregate(self, items) | group_means(items, "part", self.scale)


class ChoiceOrExact(Letter):
    name = "choice_or_exact"
    chooses = False
    version = "1"
    protocol = (
        "RealWorldQA: our letter rule where the answer is a letter; else equality after lower case, whitespace collapsed and "
        "trailing periods off"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        wanted = {collapse(reference.lower()).rstrip(". ") for reference in references(target)}
        if meta.get("options") or all(len(text) == 1 and text.isalpha() for text in wanted):
            return super().score(prediction, target, meta)
        answer = collapse(prediction.lower()).rstrip(". ")
        return Score(float(answer in wanted), answer, "equal" if answer in wanted else "different")
