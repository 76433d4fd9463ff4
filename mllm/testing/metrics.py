"""Does a metric keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm.errors import MllmError
from mllm.eval.metrics import METRICS, Metric, Score, Scored, build_metric
from mllm.eval.report.tallies import Tallies
from mllm.testing.running import run_checks

_REPLIES = (
    "", " ", "\n", "A", "(B)", "yes", "No.", "The answer is 12 %", "[0.1, 0.2, 0.3, 0.4]", "$5 and -3.2e9", "ünïcödé 漢字 🙂",
    "\x00", "\ud800", "A" * 2000, "1 " * 2000, "|a|b|\n|1|2|",
)  # fmt: skip
_TARGETS: tuple[Any, ...] = (
    "yes", ["yes"] * 10, ["yes"], "A", 1, 1.0, [0.1, 0.2, 0.5, 0.6], [1.0, 2.0, 30.0, 40.0], "entry | x\n1 | 2", {"answer": "yes"},
)  # fmt: skip
_META: dict[str, Any] = {
    "options": ["red", "blue"], "category": "all", "width": 64, "height": 48, "question": "Is it?", "question_type": "free_form",
    "answer_type": "text", "type": "Factoid", "pair": "0", "group": "0",
}  # fmt: skip

# What a model that cannot stop writes, and what patterns with two ways to match the same letters stumble over.
ENDLESS = ("1", " ", "1,1  ", 'The answer is "', "<answer>", "A or ", "((", "x")
SECONDS_PER_MEGABYTE = 12.0
"""Of a reply: a quadratic rule needs minutes, the slowest linear one here about two seconds."""
_GRACE = 0.5

Example = tuple[Any, Mapping[str, Any]]


def example_of(metric: Metric) -> Example:
    """A (target, meta) that the metric can use: its own `Metric.example`, else the first of some usual ones."""
    if metric.example is not None:
        return metric.example
    problems = []
    for target in _TARGETS:
        try:
            metric.score("yes", target, _META)
        except (MllmError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            problems.append(f"{target!r}: {type(error).__name__}: {error}")
            continue
        return target, _META
    raise AssertionError(
        "no usual target can be scored; give the class an attribute example = (target, meta) that its rule takes "
        f"({problems[0]}; {len(problems) - 1} others)"
    )


def check_words(metric: Metric | type[Metric], example: Example | None = None) -> None:
    """It says its name, its version and whose rule it is."""
    for attribute in ("name", "version", "protocol"):
        value = getattr(metric, attribute)
        assert isinstance(value, str) and value.strip(), (
            f"{attribute} is {value!r}; a score without it cannot be compared"
        )


def check_odd_replies(metric: Metric, example: Example) -> None:
    """Whatever a model says gets a `Score`: a finite value, or None where nothing could be read; the same every time."""
    for reply in _REPLIES:
        try:
            one, two = (metric.score(reply, *example) for _ in range(2))
        except Exception as error:
            raise AssertionError(f"the reply {reply[:40]!r} raises {type(error).__name__}: {error}") from error
        assert isinstance(one, Score), f"score gives {type(one).__name__}, expected a Score"
        assert one == two, f"the reply {reply[:40]!r} is scored {one.value}, then {two.value}"
        if one.value is None:
            continue
        assert math.isfinite(one.value), f"the reply {reply[:40]!r} is scored {one.value}; what cannot be read is None"
        assert not metric.binary or one.value in (0, 1), (
            f"binary is set, but the reply {reply[:40]!r} is scored {one.value}"
        )


def check_aggregate(metric: Metric, example: Example) -> None:
    """The headline is there with and without samples; unread replies are no error."""
    target, meta = example
    items = [Scored(str(k), metric.score(reply, target, meta), target, meta) for k, reply in enumerate(_REPLIES)]
    for chosen in (items, items[:1], [Scored("0", Score(None), target, meta)]):
        totals = metric.aggregate(chosen)
        assert "score" in totals and all(isinstance(v, int | float) for v in totals.values()), (
            f"aggregate gives {totals}"
        )
        assert math.isfinite(totals["score"]), f"the headline of {len(chosen)} samples is {totals['score']}"
    assert math.isnan(metric.aggregate([])["score"]), "without samples the headline is not NaN"
    forth, back = metric.aggregate(items)["score"], metric.aggregate(items[::-1])["score"]
    assert math.isclose(forth, back, rel_tol=1e-9, abs_tol=1e-9), (
        f"the order of samples changes the headline: {forth}, {back}"
    )


def check_counts(metric: Metric, example: Example) -> None:
    """Where a metric tells what a sample adds to its headline, that adds up to what `aggregate` gives."""
    target, meta = example
    items = [Scored(str(k), metric.score(reply, target, meta), target, meta) for k, reply in enumerate(_REPLIES)]
    if metric.is_mean or metric.counts(items[0]) is None:
        return
    tallies = Tallies(metric)
    for item in items:
        tallies.append(item)
    drawn = tallies.taken(np.zeros(len(items), dtype=np.int64))
    assert drawn is not None, "counts gives None for some samples and numbers for others"
    told, whole = drawn.headline(), metric.aggregate(items)["score"]
    assert math.isclose(told, whole, rel_tol=1e-9, abs_tol=1e-9), f"counts give the headline {told}, aggregate {whole}"


def check_time(metric: Metric, example: Example, *, sizes: tuple[int, ...] = (10_000, 100_000)) -> None:
    """Scoring takes time in proportion to a reply's length, whatever it is made of. sizes: characters, tried in this order."""
    metric.score("5", *example)  # imports are not the metric's time
    for size in sizes:
        allowed = _GRACE + SECONDS_PER_MEGABYTE * size / 1e6
        for unit in ENDLESS:
            for reply in (unit * (size // len(unit)), f"5{unit * (size // len(unit))}z"):
                start = time.process_time()
                metric.score(reply, *example)
                taken = time.process_time() - start
                assert taken < allowed, (
                    f"a reply of {size:,} characters ({unit!r} again and again) takes {taken:.1f} s, expected at most "
                    f"{allowed:.1f}: time must grow with the length, not its square (a pattern with two ways to match the same "
                    "letters, or int() of a long number?)"
                )


CHECKS: tuple[Callable[[Metric, Example], None], ...] = (
    check_words,
    check_odd_replies,
    check_aggregate,
    check_counts,
    check_time,
)


def check_metric(name: str) -> list[str]:
    """Run every check on the metric registered under ``name`` (of a metric of pictures, its words alone); returns the checks'
    names. Raises `AssertionError` naming the check and what broke, or `UnknownName`."""
    cls = METRICS.get(name)
    assert isinstance(cls, type) and issubclass(cls, Metric), f"{cls} is no subclass of mllm.eval.metrics.Metric"
    if not cls.reads_text:
        check_words(cls)
        return [check_words.__name__]
    metric = build_metric(name)
    example = example_of(metric)
    return run_checks(CHECKS, metric, example)
