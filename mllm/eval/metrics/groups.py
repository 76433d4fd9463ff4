"""When do several questions count as one: pairs, orders of options, and two questions on two pictures?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
from mllm.eval.metrics.letters import Letter, gold_letters, option_texts
from mllm.eval.metrics.yes_no import gold_yes


class Group:
    """Samples that are scored together, of which neither is kept. meta: what was noted of the first one's."""

    __slots__ = ("meta", "right", "size")

    def __init__(self, meta: Mapping[str, Any]):
        self.size, self.right, self.meta = 0, True, meta

    def append(self, item: Scored) -> None:
        """One more sample."""
        self.size, self.right = self.size + 1, self.right and item.value == 1


def whole_groups(
    items: Iterable[Scored],
    key: str,
    *,
    noted: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda meta: {},
    alone: bool = False,
) -> dict[str, Group]:
    """Samples by ``meta[key]``, in order of first appearance. noted: what is remembered of the ``meta`` of each group's first sample;
    alone: a sample without the key is a group by itself, else raises `DataError`."""
    groups: dict[str, Group] = {}
    known: dict[str, Mapping[str, Any]] = {}
    for item in items:
        name = item.meta.get(key)
        if name is None and not alone:
            raise DataError(f"sample {item.id}: this metric joins samples by meta.{key}, which it has not")
        name = str(item.id if name is None else name)
        if name not in groups:
            meta = noted(item.meta)
            groups[name] = Group(known.setdefault(repr(meta), meta))  # what groups have in common is there once
        groups[name].append(item)
    return groups


def category_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The category alone."""
    return {"category": meta.get("category")}


def all_right(groups: Mapping[str, Group]) -> list[float]:
    """1 for each group whose every sample is right, else 0."""
    return [float(group.right) for group in groups.values()]


def as_samples(groups: Mapping[str, Group]) -> Iterator[Scored]:
    """Each group as one sample, right or wrong."""
    return (Scored(name, Score(float(group.right)), None, group.meta) for name, group in groups.items())


class WholeGroups(Letter):
    """Our letter rule where a group is right when all of it is: what its total is drawn from."""

    group_key = "group"
    is_mean = False

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return "", (1.0, float(item.value == 1))

    def joined(self, sums: np.ndarray) -> np.ndarray:
        return np.stack([np.ones(len(sums)), sums[:, 0] == sums[:, 1]], axis=1)

    def headline(self, parts: np.ndarray) -> float:
        groups, right = parts.sum(axis=0)
        return float(self.scale * right / groups) if groups else float("nan")


class LetterGroups(WholeGroups):
    """Our letter rule; a group of samples (``meta.group``) is right when all of it is.

    size: how many samples a whole group has; ``incomplete_groups`` counts those that have another number (a limited run, a
    broken file). also: further keys of ``meta`` that join samples in other ways; each gives a total under its own name.
    """

    name = "letter_groups"
    protocol = "our letter rule; a group (a pair of pictures, all orders of the options) is right when all of it is"
    example = ("A", {"options": ["red", "blue"], "group": "0"})

    def __init__(self, size: int | None = None, also: Sequence[str] = ()):
        self.size, self.also = size, list(also)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        groups = whole_groups(items, "group", noted=category_of)
        result = {
            "score": self.scale * mean(all_right(groups)),
            "accuracy": self.scale * mean(item.value for item in items),
        }
        result["groups"] = float(len(groups))
        if self.size is not None:
            result["incomplete_groups"] = float(sum(group.size != self.size for group in groups.values()))
        for key in self.also:
            result[key] = self.scale * mean(all_right(whole_groups(items, key)))
        return result | group_means(as_samples(groups), "category", self.scale)


class NaturalBench(Metric):
    """Two questions on two pictures: ``meta.group``, and ``meta.place`` 0 to 3 for (question 0, picture 0), (0, 1), (1, 0),
    (1, 1). Headline: percent of groups with all four right; ``question`` both pictures of a question, ``image`` both
    questions of a picture. A group that is not whole is left out and counted."""

    name = "naturalbench"
    group_key = "group"
    protocol = (
        "NaturalBench: the first of the words yes and no (of a choice: A and B), any case; a group of two questions on two "
        "pictures is right when all four answers are"
    )
    is_mean = False
    example = ("yes", {"group": "0", "place": 0})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        choice = str(target).strip().upper() in ("A", "B")
        words = ("a", "b") if choice else ("yes", "no")
        gold = str(target).strip().lower() if choice else ("yes" if gold_yes(target) else "no")
        found = re.search(rf"\b(?:{words[0]}|{words[1]})\b", prediction, re.IGNORECASE)
        if found is None:
            return Score(None, "", f"neither {words[0]} nor {words[1]}")
        return Score(float(found[0].lower() == gold), found[0].lower(), "first of the two words")

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        place = [float(int(item.meta["place"]) == k) for k in range(4)]
        return "", (1.0, *place, float(item.value == 1))

    def joined(self, sums: np.ndarray) -> np.ndarray:
        whole = (sums[:, :5] == [4, 1, 1, 1, 1]).all(axis=1)
        return np.stack([whole, whole & (sums[:, 5] == 4), np.ones(len(sums))], axis=1).astype(float)

    def headline(self, parts: np.ndarray) -> float:
        whole, right, groups = parts.sum(axis=0)
        return float(self.scale * right / whole) if whole else (0.0 if groups else float("nan"))

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        groups: dict[str, list[int]] = {}  # answers, a bit for each place answered, a bit for each that is right
        for item in items:
            if (name := item.meta.get("group")) is None:
                raise DataError(f"sample {item.id}: this metric joins samples by meta.group, which it has not")
            group, place = groups.setdefault(str(name), [0, 0, 0]), 1 << int(item.meta["place"])
            group[0], group[1], group[2] = group[0] + 1, group[1] | place, group[2] | (place if item.value == 1 else 0)
        whole, question, image = [], [], []
        for size, places, right in groups.values():
            if size != 4 or places != 0b1111:
                continue
            question += [right & 0b0011 == 0b0011, right & 0b1100 == 0b1100]
            image += [right & 0b0101 == 0b0101, right & 0b1010 == 0b1010]
            whole.append(right == 0b1111)

        def percent(values: Sequence[bool]) -> float:
            return self.scale * sum(values) / len(values) if values else 0.0

        result = {
            "score": percent(whole) if items else float("nan"),
            "question": percent(question),
            "image": percent(image),
        }
        result["accuracy"] = self.scale * mean(item.value for item in items)
        return result | {"groups": float(len(whole)), "incomplete_groups": float(len(groups) - len(whole))}


_STEPS = ("2steps", "3steps")
_KEYS = tuple(f"{kind}_{part}" for kind in _STEPS for part in (*map(str, range(1, int(kind[0]) + 1)), "multi"))


class WeMath(Letter):
    """``meta.problem`` joins a problem's questions, ``meta.key`` names them: ``2steps_1``, ``2steps_2``, ``2steps_multi`` and
    likewise for three steps. Headline: the strict score."""

    name = "wemath"
    group_key = "problem"
    protocol = (
        "We-Math: our letter rule; of problems of two and three steps, 100 % less those with all steps known and the whole "
        "wrong (half), a step unknown and the whole wrong, and a step unknown and the whole right (loose: no step known)"
    )
    is_mean = False
    example = ("A", {"options": ["red", "blue"], "problem": "0", "key": "2steps_1"})

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        options = option_texts(meta)
        gold = gold_letters(target, options)
        letter, rule = self.read(prediction, options)
        return Score(None, "", rule) if letter is None else Score(float(letter in gold), letter, rule)

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        place = [float(str(item.meta.get("key")) == key) for key in _KEYS]
        kind = str(item.meta.get("key")).partition("_")[0]  # a problem's two and three steps are two problems
        return kind, (1.0, *place, *(float(item.value == 1) * asked for asked in place))

    def joined(self, sums: np.ndarray) -> np.ndarray:
        whole, lost = np.zeros(len(sums), bool), np.zeros(len(sums))
        for first, last in ((0, 3), (3, 7)):
            asked, right = sums[:, 1 + first : 1 + last], sums[:, 8 + first : 8 + last]
            here = (asked > 0).all(axis=1)
            known, solved = (right[:, :-1] > 0).all(axis=1), right[:, -1] > 0
            whole |= here
            lost += here * np.where(solved, ~known, np.where(known, 0.5, 1.0))
        return np.stack([whole, lost, np.ones(len(sums))], axis=1).astype(float)

    def headline(self, parts: np.ndarray) -> float:
        whole, lost, problems = parts.sum(axis=0)
        return float(self.scale * (whole - lost) / whole) if whole else (0.0 if problems else float("nan"))

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        problems: dict[tuple[str, str], dict[str, bool]] = {}
        single = []
        for item in items:
            kind, _, part = str(item.meta.get("key")).partition("_")
            if kind in _STEPS and part:
                problems.setdefault((kind, str(item.meta["problem"])), {})[part] = item.value == 1
            single.append(item.value)
        counts: dict[str, int] = dict.fromkeys(("IG", "IK", "CM_strict", "CM_loose", "RM_strict", "RM_loose"), 0)
        whole = 0
        for (kind, _), right in problems.items():
            steps = [str(k + 1) for k in range(int(kind[0]))]
            if set(right) != {*steps, "multi"}:
                continue
            whole += 1
            known = [right[step] for step in steps]
            if not right["multi"]:
                counts["IG" if all(known) else "IK"] += 1
                continue
            counts["CM_strict" if all(known) else "RM_strict"] += 1
            counts["CM_loose" if any(known) else "RM_loose"] += 1

        def total(way: str) -> float:
            lost = 0.5 * counts["IG"] + counts["IK"] + counts[f"RM_{way}"]
            return self.scale * (whole - lost) / whole if whole else 0.0

        result = {"score": total("strict") if items else float("nan"), "loose": total("loose")}
        result |= {name: self.scale * count / whole if whole else 0.0 for name, count in counts.items()}
        result |= {"accuracy": self.scale * mean(single), "problems": float(whole)}
        return result | {"incomplete_problems": float(len(problems) - whole)}
