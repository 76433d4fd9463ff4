"""Which of its options does a free reply choose, and does it choose one at all?"""

from __future__ import annotations

import itertools
import re
import string
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mllm.eval.metrics import choosing_words as words
from mllm.eval.metrics.text import collapse

LETTERS = string.ascii_uppercase
_HEAD, _TAIL = 2_000, 8_000  # of a longer reply only its beginning and its end are read
_WINDOW, _CUE = 100, 64  # how far from a letter the words are looked for that deny it, that announce it

# What a mention does in its sentence, from strongest to weakest.
FINAL, CLAIM, BARE, DENIED, ASIDE = 3, 2, 1, 0, -1


@dataclass(frozen=True)
class Mention:
    """One place that names options: ``letters`` holds several where they are offered together (``A or C``)."""

    start: int
    end: int
    letters: frozenset[str]
    weight: int
    rule: str


def choose(reply: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    """(letter or None, the rule that decided). ``options``: letter → text; empty when only letters are known.

    A reply chooses when it says so (a final answer, ``answer is X``, ``X is correct``, a letter by itself) or is one
    option's text. A later correction ("no wait, C") replaces what stood before it. What is denied ("not A", "(B) is
    wrong"), offered together ("A or C"), asked, supposed or recalled ("A looked right at first") is no choice.
    """
    text, unfinished = _visible(reply)
    if unfinished:
        return None, "thinking never ended"
    reader = _Reader(options)
    bare = text.strip(words.EDGE)
    if not bare:
        return None, "empty"
    if bare.upper() in reader.legal:
        return bare.upper(), "letter alone"
    if (letter := reader.equal(text)) is not None:
        return letter, "option's text"
    return _decide(reader, text)


def _visible(reply: str) -> tuple[str, bool]:
    """(the reply without thoughts and markup, did its thinking never end?). Finals keep a mark of their own."""
    _, closed, tail = reply.rpartition("</think>")
    if not closed:
        tail = reply
        if "<think>" in reply:
            return "", True
    elif not tail.strip():
        return "", False
    if len(tail) > _HEAD + _TAIL:
        tail = f"{tail[:_HEAD]}\n{tail[-_TAIL:]}"
    tail = words.FINAL_MARK.sub(" final answer: ", tail)
    return words.ALL_BUT.sub("not", words.IDIOMS.sub("surely", _unmarked(tail))), False


def _decide(reader: _Reader, text: str) -> tuple[str | None, str]:
    mentions = reader.mentions(text)
    stated: list[Mention] = []
    turns = [found.start() for found in words.REVISES.finditer(text)]
    bounds = [0, *turns, len(text) + 1]
    starts = [mention.start for mention in mentions]
    for low, high in itertools.pairwise(bounds):
        part = mentions[bisect_left(starts, low) : bisect_left(starts, high)]
        if low and any(mention.weight >= BARE for mention in part):
            denied = [mention for mention in stated if mention.weight == DENIED]
            stated = denied + [replace(m, weight=CLAIM, rule="revised") if m.weight == BARE else m for m in part]
        elif part or not words.RETRACTS.match(text[low : min(high, low + _WINDOW)]):
            stated = stated + part
        else:  # "B? No.": taken back, and nothing in its place
            stated = [replace(mention, weight=min(mention.weight, ASIDE)) for mention in stated]
    return _weigh(stated, text)


def _weigh(stated: Sequence[Mention], text: str) -> tuple[str | None, str]:
    finals = [mention for mention in stated if mention.weight == FINAL]
    claims = finals[-1:] or [mention for mention in stated if mention.weight == CLAIM]
    if any(len(mention.letters) == 1 for mention in claims):  # "A or C, but most likely C": the offer is settled
        last = max(place for place, mention in enumerate(claims) if len(mention.letters) == 1)
        claims = [m for place, m in enumerate(claims) if place >= last or not m.letters > claims[last].letters]
    if claims:
        letters = frozenset[str]().union(*(mention.letters for mention in claims))
        denied = frozenset[str]().union(
            *(m.letters for m in stated if m.weight == DENIED and (not finals or m.start > finals[-1].start))
        )
        if len(letters) > 1:
            return None, "several letters"
        (letter,) = letters
        if letter in denied:
            return None, "said and denied"
        return (letter, claims[-1].rule) if letter else (None, "letter and option's text disagree")
    bare = [mention for mention in stated if mention.weight == BARE]
    letters = frozenset[str]().union(*(mention.letters for mention in bare))
    if len(letters) > 1:
        return None, "several letters"
    if len(letters) == 1:
        (letter,) = letters
        if named := [mention.rule for mention in bare if mention.rule in ("one (X)", "option X")]:
            return letter, named[0]
        if len(text.split()) <= 6 and all(mention.rule == "letter" for mention in bare):
            return letter, "only letter in a short reply"
    if any(mention.weight == DENIED for mention in stated):
        return None, "only denied"
    return None, "no letter"


class _Reader:
    """Finds the places where a reply names options."""

    def __init__(self, options: Mapping[str, str]):
        self.options = options
        self.legal = frozenset(options or LETTERS)
        self.texts: dict[str, str | None] = {}  # normal form → letter; None where two options read alike
        for letter, option in options.items():
            plain = _plain(_unmarked(option))
            for form in {plain, words.ARTICLE.sub("", plain, count=1)} - {""}:
                self.texts[form] = letter if self.texts.get(form, letter) == letter else None
        self._starts = _prefixes(tuple(self.texts))

    def equal(self, text: str) -> str | None:
        """The option whose text this is: case, outer marks and a leading article do not count."""
        plain = _plain(text[: 2 * _TAIL])
        for form in (plain, words.ARTICLE.sub("", plain, count=1)):
            if self.texts.get(form):
                return self.texts[form]
        return None

    def text_at(self, text: str, start: int) -> tuple[str, int] | None:
        """(letter, end) of the longest option text that stands at ``start`` and ends with its words."""
        if self._starts is None:
            return None
        article = words.ARTICLE.match(text, start)
        for place in (start, article.end()) if article else (start,):
            found = self._starts.match(text, place)
            if found and words.GOES_ON.match(text, found.end()) and found[0][-1].isdigit():
                continue
            if found and (letter := self.texts.get(_plain(found[0]))):
                return letter, found.end()
        return None

    def mentions(self, text: str) -> list[Mention]:
        found: list[Mention] = []
        atoms = list(self._atoms(self._without_listing(text)))
        groups: list[tuple[int, int, frozenset[str], str]] = []
        for start, end, letter, form in atoms:
            if groups and start < groups[-1][1]:
                continue
            gap = text[groups[-1][1] : start] if groups else ""
            textual = "option's text" in (form, groups[-1][3]) if groups else False
            if groups and form == "option's text" and re.fullmatch(rf"\W*{words.COPULA}\W*", gap):
                continue  # "(A) is 12" explains an option, it does not choose one
            if (
                groups
                and len(gap) < 24
                and words.JOINED.fullmatch(f"{gap.strip(words.BRACKETS)} ")
                and (not textual or re.search(r"\w", gap))
            ):
                low, _, letters, kept = groups[-1]
                groups[-1] = (low, end, letters | {letter}, kept)
                continue
            groups.append((start, end, frozenset({letter}), form))
        for position, (start, end, letters, form) in enumerate(groups):
            before = groups[position - 1][1] if position else 0
            after = groups[position + 1][0] if position + 1 < len(groups) else len(text)
            found.append(self._mention(text, before, start, end, after, letters, form))
        return found

    def _without_listing(self, text: str) -> str:
        """The text with a repetition of all options (``A. 12 B. 15 …``) blanked out."""
        if len(self.options) < 2:
            return text
        place, first = 0, -1
        for letter, option in self.options.items():
            pattern = rf"(?<!\w)\(?{letter}[).:]+\s*" + _spaced(_unmarked(option))
            if (found := re.compile(pattern, re.IGNORECASE).search(text, place)) is None:
                return text
            first, place = (found.start() if first < 0 else first), found.end()
        return text[:first] + " " * (place - first) + text[place:]

    def _atoms(self, text: str) -> Iterator[tuple[int, int, str, str]]:
        """(start, end, letter, form) of every letter and every option text in a place where it can be an answer."""
        for found in re.finditer(
            r"(?<![A-Za-z0-9_'’.-])[A-Za-z](?![A-Za-z0-9_'’])|(?<![\w'’])(?=[\w\"“$€£+.−-])", text
        ):
            start, end = found.span()
            if (at := self.text_at(text, start)) is not None and self._stands_for_answer(text, start, at[1]):
                yield start, at[1], at[0], "option's text"
                continue
            if start == end or found[0].upper() not in self.legal:
                continue
            if (form := self._form(text, start, end)) is not None:
                letter, stop = found[0].upper(), end + (text[end : end + 1] in (")", "]"))
                mark = re.match(r"[\s.:\"'”–—-]*\(?", text[stop : stop + 12])
                own = self.text_at(text, stop + (mark.end() if mark else 0))
                yield start, (own[1] if own and own[0] == letter else stop), letter, form

    def _stands_for_answer(self, text: str, start: int, end: int) -> bool:
        """Whether an option's text is said, and not only part of a sentence: it follows a cue, a denial or another
        option, or it is a whole sentence; and its sentence goes on in no other way."""
        rest = text[end : end + 24]
        if not words.CAN_FOLLOW.match(rest) or (text[start].isdigit() and text[start - 1 : start] in tuple("-−.")):
            return False
        before = text[max(0, start - _WINDOW) : start]
        clause = words.SENTENCE.split(before)[-1]
        return (
            not clause.strip(words.EDGE)
            or _announces(clause[-_CUE:]) in ("final", "claim")
            or words.DENIES_BEFORE.search(clause[-20:]) is not None
            or words.JOINED.search(clause) is not None
        )

    def _form(self, text: str, start: int, end: int) -> str | None:
        """How a letter is written (``one (X)``, ``letter``), or None where it is a word: the article, the pronoun."""
        letter, previous, following = text[start:end], text[start - 1 : start], text[end : end + 1]
        clause = text[max(0, start - _WINDOW) : start]
        if previous == "(" and following == ")":
            return "one (X)"
        leads = not clause.strip(words.EDGE)
        marked = following in (")", ".", ":", "]") or previous in ("(", "[", '"', "'", "“")
        if letter.islower():
            if not words.CAN_FOLLOW.match(text[end : end + 24].split("\n")[0]):
                return None
            if words.NAMED.search(clause):
                return "option X"
            return "letter" if (leads and marked) or _announces(clause[-_CUE:]) in ("final", "claim") else None
        if words.NAMED.search(clause):
            return "option X"
        if letter == "I":
            return "letter" if re.match(r"\s*(?:$|[).:\]\"'”]|,\s*because)", text[end : end + 12]) else None
        if (word := words.WORD_BEFORE.search(clause)) and not words.BEFORE_LETTER.fullmatch(word[1]):
            return None  # "Vitamin C", "point B": a name
        if letter == "A":
            line = text[end : end + 24].split("\n")[0]
            own = self.text_at(text, end + len(line) - len(line.lstrip()))
            return "letter" if words.CAN_FOLLOW.match(line) or (own and own[0] == "A") else None
        return "letter"

    def _mention(
        self, text: str, low: int, start: int, end: int, high: int, letters: frozenset[str], form: str
    ) -> Mention:
        before = text[max(low, start - _WINDOW, 0) : start]
        after = text[end : min(high, end + _WINDOW)]
        clause = words.BREAKS.split(before)[-1]
        sentence = words.SENTENCE.split(before)[-1]
        whole = words.CONTRAST.split(text[max(0, start - _WINDOW) : start])[-1]
        tail = _after_own_text(after)
        rest = words.SENTENCE.split(tail)[0]

        def mention(weight: int, rule: str) -> Mention:
            return Mention(start, end, letters, weight, rule)

        if words.DENIES_BEFORE.search(clause) or words.DENIED_LABEL.search(sentence) or words.DENIES_AFTER.match(rest):
            return mention(DENIED, "denied")
        if re.match(r"\W*\?", after) and len(text) - end > 2:
            return mention(ASIDE, "asked")
        affirmed = words.AFFIRMS_AFTER.match(rest) is not None
        if words.EARLIER.search(whole) or words.EARLIER.search(rest):
            return mention(ASIDE, "recalled")
        if words.MAYBE_AFTER.match(rest) or (
            words.MAYBE_BEFORE.search(clause) and (affirmed or "if" in clause.lower().split())
        ):
            return mention(ASIDE, "supposed")
        if len(letters) == 1 and self._disagrees(text, end, next(iter(letters)), form):
            letters = frozenset({""})
        announced = _announces(sentence[-_CUE:])
        if announced == "final":
            return mention(FINAL, "final answer")
        if affirmed:
            return mention(CLAIM, "X is correct")
        if announced == "claim" or (announced and form != "option's text"):
            return mention(CLAIM, "answer is X" if form != "option's text" else "option's text")
        if not sentence.strip(words.EDGE) and low <= start:
            alone = not rest.strip(words.EDGE) or (form == "option's text" and re.match(r"\s*[,;:(]", after))
            leading = not text[:start].strip(words.EDGE) and re.match(
                r"[)\].:,\n-]|\s*[-–—\n]|\s+(?:because|since|as|due|for)\b|\s*\(", after
            )
            if "" in letters or alone or leading:
                return mention(CLAIM, "option's text" if form == "option's text" else "leading letter")
        return mention(BARE, form)

    def _disagrees(self, text: str, end: int, letter: str, form: str) -> bool:
        """Whether another option's text stands right behind a letter (``C. 15`` where 15 is B)."""
        if form == "option's text":
            found = re.match(r"\s*\(([A-Z])\)", text[end : end + 12])
            return bool(found and found[1] in self.legal and found[1] != letter)
        found = re.match(r"[\s).:\]\"'”,–—-]*\(?", text[end : end + 12])
        at = self.text_at(text, end + (found.end() if found else 0))
        return bool(at and at[0] != letter and words.CAN_FOLLOW.match(text[at[1] : at[1] + 24]))


@lru_cache(maxsize=4096)
def _announces(before: str) -> str:
    """What these words, right before an option, make of it: a ``final`` answer, a ``claim``, a ``hint`` or nothing."""
    for pattern, name in ((words.FINAL_CUE, "final"), (words.CUE, "claim"), (words.WEAK_CUE, "hint")):
        if pattern.search(before):
            return name
    return ""


def _after_own_text(after: str) -> str:
    """What follows a letter, past an explanation in brackets (``B (15) is wrong``)."""
    return re.sub(r"\A\s*[)\]:.]?\s*\([^()]{0,60}\)", "", after)


def _plain(text: str) -> str:
    """Lower case, without quotes around it and marks behind it; signs and brackets are part of an option."""
    return collapse(text).strip("\"'“”‘’ ").rstrip(".,:;!? ").lower()


def _unmarked(text: str) -> str:
    """The text without LaTeX and markdown marks."""
    return words.MARKUP.sub(lambda found: "" if found[0][0] in "*`_" else " ", text)


@lru_cache(maxsize=4096)
def _prefixes(texts: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all option texts, the longest first."""
    if not texts:
        return None
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile(rf"(?:{'|'.join(map(_spaced, ordered))})(?!\w)", re.IGNORECASE)


def _spaced(text: str) -> str:
    """A pattern for the text with any run of white space between its words."""
    return r"\s+".join(map(re.escape, text.split()))
