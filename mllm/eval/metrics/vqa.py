"""How is an answer scored against ten human answers (VQAv2, TextVQA, VizWiz, OK-VQA)?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.base import Metric, Score, Scored, group_means
from mllm.eval.metrics.text import references, remember_short

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the official code hands re.UNICODE (32) to `count`: only this many periods go
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}


def _contractions() -> dict[str, str]:
    """The official table of 120 entries: an apostrophe left out is put back. Where two are due, one is missing."""
    one = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
        how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
        should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
        there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
        what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
        y'all you'd you'll you're you've"""
    several = """'ow's'at I'd've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
        someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've"""
    table = {word.replace("'", ""): word for word in one.split()}
    for word in several.split():
        for position in (k for k, letter in enumerate(word) if letter == "'"):
            table[word[:position] + word[position + 1 :]] = word
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """The official punctuation rule: a mark beside a space, or anywhere once digits surround a comma, is deleted; else
    it becomes a space. Periods not followed by a digit go (the first 32 of them)."""
    delete_all = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            result = result.replace(mark, "" if delete_all or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """The official word rule: lower case, number words to ten as digits, no articles, apostrophes restored."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@remember_short
def normalise_vqa(text: str) -> str:
    """VQAv2's normal form: punctuation, then words."""
    return normalise_words(strip_punctuation(_one_line(text)))


@remember_short
def normalise_m4c(text: str) -> str:
    """TextVQA's normal form (M4C): lower case, commas and question marks gone, possessives split, then VQAv2's."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(_one_line(text)))


def consensus(answer: str, humans: Sequence[str]) -> tuple[float, int]:
    """(mean over the humans of min(1, matches among the *other* humans / 3), number of matches). A single human answer
    has no others, where the formula could only give 0: it is compared directly."""
    matches = sum(human == answer for human in humans)
    if len(humans) == 1:
        return float(matches), matches
    total = sum(min(1.0, (matches - (human == answer)) / 3) for human in humans)
    return total / len(humans), matches


_ALONE = "human answer is compared directly (the published formula can only give it 0)"


class _Consensus(Metric):
    binary = False

    def normalise(self, text: str) -> str:
        raise NotImplementedError

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = self.normalise(prediction)
        value, matches = consensus(answer, [self.normalise(human) for human in references(target)])
        return Score(value, answer, f"{matches} matching answers")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        return super().aggregate(items) | {
            f"{key}/{name}": value
            for key in ("answer_type", "question_type")
            for name, value in group_means(items, key, self.scale).items()
        }


class VqaEvalAi(_Consensus):
    name = "vqa_evalai"
    protocol = (
        "VQA accuracy as the EvalAI server and papers use it: prediction and human answers always normalised; a single "
        f"{_ALONE}"
    )

    def normalise(self, text: str) -> str:
        return normalise_vqa(text)


class TextVqaM4c(_Consensus):
    name = "textvqa_m4c"
    protocol = (
        f"VQA accuracy with M4C's answer processor: commas and ? removed first, possessives split; a single {_ALONE}"
    )

    def normalise(self, text: str) -> str:
        return normalise_m4c(text)


class VqaOfficial(_Consensus):
    name = "vqa_official"
    protocol = (
        "VQA accuracy by the published script: nothing is normalised when the human answers are all the same string; a "
        f"single {_ALONE}"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer, humans = _one_line(prediction), [_one_line(human) for human in references(target)]
        unanimous = len(set(humans)) == 1
        if not unanimous:
            answer, humans = normalise_vqa(answer), [normalise_vqa(human) for human in humans]
        value, matches = consensus(answer, humans)
        return Score(value, answer, f"{matches} matching answers" + (", unanimous: compared raw" if unanimous else ""))


class StVqaAccuracy(Metric):
    name = "stvqa_accuracy"
    protocol = "ST-VQA accuracy: right if M4C's normal form is among the references"

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        answer = normalise_m4c(prediction)
        found = answer in {normalise_m4c(reference) for reference in references(target)}
        return Score(float(found), answer, "in the answer set" if found else "not in the answer set")
