"""How are answers compared as text: lists of references, edit distance, numbers?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

from mllm.errors import DataError

NUMBER_WORDS = {
    word: number
    for number, word in enumerate((
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
    ))
}  # fmt: skip


def references(target: Any) -> list[str]:
    """A target as a non-empty list of reference strings: a string, a number, or a list of either or of
    ``{"answer": …}``. Raises `DataError` when there is none."""
    if isinstance(target, str | int | float):
        return [str(target)]
    if isinstance(target, list | tuple) and target:
        found = [entry["answer"] if isinstance(entry, dict) and "answer" in entry else entry for entry in target]
        if all(isinstance(entry, str | int | float) for entry in found):
            return [str(entry) for entry in found]
    raise DataError(f"target {target!r} holds no reference answer; expected a string or a non-empty list of strings")


T = TypeVar("T")
_REMEMBERED = 1_000  # characters: longer texts are worked out anew, a cache of them would fill the memory


def remember_short(function: Callable[..., T]) -> Callable[..., T]:
    """An `lru_cache` for functions of strings that keeps no long ones."""
    cached = lru_cache(maxsize=65536)(function)

    @wraps(function)
    def call(*texts: str) -> T:
        return (cached if all(len(text) <= _REMEMBERED for text in texts) else function)(*texts)

    return call


class EditDistances:
    """Levenshtein distances (insertions, deletions and substitutions, each at cost 1) from one text to several patterns in one
    walk over the text.

    Bit-parallel (Myers 1999, in Hyyrö's form): one column of a pattern's table is a span of two integers' bits, so the time is
    about linear in the text. The spans lie side by side, a bit apart, which catches the addition's carry.
    """

    def __init__(self, patterns: Sequence[str]):
        self._places: dict[str, int] = {}
        self._spans: list[int] = []
        self._starts, start = 0, 0
        for pattern in patterns:
            for position, letter in enumerate(pattern, start):
                self._places[letter] = self._places.get(letter, 0) | (1 << position)
            self._spans.append(((1 << len(pattern)) - 1) << start)
            self._starts |= 1 << start
            start += len(pattern) + 1
        self._mask = sum(self._spans)

    def __call__(self, text: str) -> list[int]:
        """The distance of ``text`` to each pattern, in their order."""
        places, mask, starts = self._places, self._mask, self._starts
        up, down = mask, 0  # vertical differences of +1 and -1
        for letter in text:
            equal = places.get(letter, 0)
            diagonal = (((equal & up) + up) ^ up) | equal | down
            plus, minus = down | (~(diagonal | up) & mask), up & diagonal
            plus, minus = ((plus << 1) | starts) & mask, (minus << 1) & mask
            up, down = minus | (~(diagonal | plus) & mask), plus & diagonal
        return [len(text) + (up & span).bit_count() - (down & span).bit_count() for span in self._spans]


@remember_short
def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance of two texts, in time about linear in the longer one (`EditDistances`)."""
    if left == right:
        return 0
    if len(left) > len(right):
        left, right = right, left
    return EditDistances([left])(right)[0]


def collapse(text: str) -> str:
    """Runs of whitespace become one space; ends are stripped."""
    return " ".join(text.split())


def percent_or_float(text: str) -> float | None:
    """The number a string is: ``"5%"`` is 0.05; None when it is none. Python's own float syntax, nothing stripped from
    inside: ``"1,000"``, ``"$5"`` and ``"5 million"`` are none (pix2struct's rule)."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def plain_float(text: Any) -> float | None:
    """``float(text)`` or None."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def tagged(text: str, tag: str) -> str | None:
    """Content of the first ``<TAG>…</TAG>``, None without one."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


_MOST_WORDS = 600


def rouge_l(reply: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (letters and digits, lower case; not stemmed)."""
    given, wanted = _words(reply), _words(reference)
    if not given or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)
    for word in given:
        diagonal = 0
        for place, other in enumerate(wanted, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(given) + len(wanted))


def _words(text: str) -> list[str]:
    return "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()[:_MOST_WORDS]
