"""How are MMMU's multiple-choice and open answers read and scored?"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.base import Metric, Score, Scored, group_means, means_by
from mllm.eval.metrics.letters import gold_letters, option_texts
from mllm.eval.metrics.text import references

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}
_END_MARKS = ",.!?;:'"


def read_choice(reply: str, options: Mapping[str, str], patterns: Sequence[str]) -> tuple[str | None, str]:
    """(letter or None, rule): letters as ``(A)``, then as each of ``patterns``, then option texts in replies longer
    than five words; the first form that finds anything decides, its last occurrence in the reply wins."""
    for mark in _END_MARKS:
        reply = reply.strip(mark)
    text = f" {reply} "
    found = [letter for letter in options if f"({letter})" in text]
    if found:
        return max(found, key=lambda letter: text.rfind(f"({letter})")), "(X)"
    for pattern in patterns:
        found = [letter for letter in options if pattern.format(letter) in text]
        if found:
            # places are compared as ' X ' whatever the pattern was; max() keeps the first of equals, as argmax does
            return max(found, key=lambda letter: text.rfind(f" {letter} ")), f"as {pattern.format('X')!r}"
    if len(text.split()) > 5:
        lowered = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(options[letter].lower())), "option's text"
    return None, "no letter and no option's text"


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (  # the published patterns; a run of digits is entered at its beginning only, so a long one costs its length
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"(?:-|(?<!\d))\d++(?:\.\d++)?[eE][+-]?\d++"),
    re.compile(r"(?:-?\.\d++|(?:-|(?<!\d))(?:\d++\.\d++|\d++\b))(?![eE][+-]?\d)(?![,\d])"),
)


def normalise_open(text: str) -> list[str | float]:
    """A number as a float rounded to 2 places; other text in lower case; a single character padded on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(reply: str) -> list[str | float]:
    """Everything an open reply may be claiming, in order, without repeats: key phrases' tails and the numbers in
    them."""
    lines = reply.strip().strip(".").lower().split("\n")
    tails = []
    for position, line in enumerate(lines):
        keys = _KEYS if position < len(lines) - 1 else (*_KEYS, "=")
        ends = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in _END_MARKS:
            tails.append(shortest)
    tails = tails or ["\n".join(lines)]
    claims = tails + [number for tail in tails for form in _NUMBER_FORMS for number in form.findall(tail)]
    return list(dict.fromkeys(value for claim in claims for value in normalise_open(claim)))


def open_match(claims: Sequence[str | float], gold: Sequence[str]) -> str | float | None:
    """The claim that meets a gold answer: a gold text inside a claimed text, or an equal number; None when none
    does."""
    wanted = [value for answer in gold for value in normalise_open(answer)]
    for claim in claims:
        if isinstance(claim, str):
            if any(isinstance(value, str) and value in claim for value in wanted):
                return claim
        elif claim in wanted:
            return claim
    return None


class Mmmu(Metric):
    """``meta.question_type``: ``multiple-choice`` (with ``options``); anything else (``open``, ``short-answer``) is
    open.

    random_fallback: for parity with the published script, an unreadable choice becomes a random option, drawn from
    this seed and the sample itself, so the result does not depend on order.
    """

    name = "mmmu"
    protocol = "MMMU's own parser; an unreadable choice is unparsed where the published script guesses at random"
    patterns: Sequence[str] = (" {} ",)

    def __init__(self, random_fallback: int | None = None):
        self.random_fallback = random_fallback

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        options = option_texts(meta)
        kind = meta.get("question_type") or ("multiple-choice" if options else "open")
        if kind != "multiple-choice":
            claims = read_open(prediction)
            claim = open_match(claims, references(target))
            shown = str(claim) if claim is not None else " | ".join(str(value) for value in claims)
            return Score(float(claim is not None), shown, "open: number" if isinstance(claim, float) else "open: text")
        letter, rule = self.read(prediction, options)
        if letter is None and self.random_fallback is not None:
            generator = random.Random(f"{self.random_fallback}|{prediction}|{sorted(options.items())}")
            letter, rule = generator.choice(sorted(options)), "random fallback"
        if letter is None:
            return Score(None, "", rule)
        return Score(float(letter in gold_letters(target, options)), letter, rule)

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        return read_choice(reply, options, self.patterns)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        domains = (
            (_DOMAIN_OF[name], item.value) for item in items if (name := str(item.meta.get("category"))) in _DOMAIN_OF
        )
        kinds = group_means(items, "question_type", self.scale)
        return super().aggregate(items) | kinds | means_by(domains, self.scale)


class MmmuLmmsEval(Mmmu):
    name = "mmmu_lmms_eval"
    protocol = (
        "MMMU with lmms-eval's letter rules ('A ' without a space before, then 'A.'); open questions as MMMU's own "
        "parser"
    )
    patterns = ("{} ", "{}.")


class MmmuPro(MmmuLmmsEval):
    name = "mmmu_pro"
    chooses = True
    protocol = (
        "MMMU-Pro's own parser: one option letter after the last 'Answer:', then its letter rules; unreadable is "
        "unparsed"
    )

    def read(self, reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
        _, marker, tail = reply.rpartition("Answer:")
        found = [letter for letter in options if letter in tail] if marker else []
        return (found[0], "one letter after 'Answer:'") if len(found) == 1 else super().read(reply, options)
