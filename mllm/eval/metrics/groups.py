"""When do several questions count as one: pairs, orders of options, and two questions on two pictures?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, group_means, mean
from mllm.eval.metrics.letters import Letter, gold_letters, option_texts
from mllm.eval.metrics.yes_no import gold_yes


def whole_groups(items: Sequence[Scored], key: str) -> dict[str, list[Scored]]:
    """Samples by ``meta[key]``, in order of first appearance. Raises `DataError` for a sample without it."""
    groups: dict[str, list[Scored]] = {}
    for item in items:
        if item.meta.get(key) is None:
            raise DataError(f"sample {item.id}: this metric joins samples by meta.{key}, which it has not")
        groups.setdefault(str(item.meta[key]), []).append(item)
    return groups


def all_right(groups: Mapping[str, Sequence[Scored]]) -> list[float]:
    """1 for each group whose every sample is right, else 0."""
    return [float(all(item.value == 1 for item in group)) for group in groups.values()]


class LetterGroups(Letter):
    """Our letter rule; a group of samples (``meta.group``) is right when all of it is.

    size: how many samples a whole group has; ``incomplete_groups`` counts those that have another number (a limited run, a
    broken file). also: further keys of ``meta`` that join samples in other ways; each gives a total under its own name.
    """

    name = "letter_groups"
    group_key = "group"
    protocol = "our letter rule; a group (a pair of pictures, all orders of the options) is right when all of it is"
    is_mean = False
    example = ("A", {"options": ["red", "blue"], "group": "0"})

    def __init__(self, size: int | None = None, also: Sequence[str] = ()):
        self.size, self.also = size, list(also)

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        groups = whole_groups(items, "group")
        result = {
            "score": self.scale * mean(all_right(groups)),
            "accuracy": self.scale * mean([i.value for i in items]),
        }
        result["groups"] = float(len(groups))
        if self.size is not None:
            result["incomplete_groups"] = float(sum(len(group) != self.size for group in groups.values()))
        for key in self.also:
            result[key] = self.scale * mean(all_right(whole_groups(items, key)))
        joined = [
            Scored(name, Score(value), None, group[0].meta)
            for (name, group), value in zip(groups.items(), all_right(groups))
        ]
        return result | group_means(joined, "category", self.scale)


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

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        groups = whole_groups(items, "group")
        whole, question, image = [], [], []
        for group in groups.values():
            right = {int(item.meta["place"]): item.value == 1 for item in group}
            if sorted(right) != [0, 1, 2, 3] or len(group) != 4:
                continue
            question += [right[0] and right[1], right[2] and right[3]]
            image += [right[0] and right[2], right[1] and right[3]]
            whole.append(all(right.values()))

        def percent(values: Sequence[bool]) -> float:
            return self.scale * sum(values) / len(values) if values else 0.0

        result = {
            "score": percent(whole) if items else float("nan"),
            "question": percent(question),
            "image": percent(image),
        }
        result["accuracy"] = self.scale * mean([item.value for item in items])
        return result | {"groups": float(len(whole)), "incomplete_groups": float(len(groups) - len(whole))}


_STEPS = ("2steps", "3steps")


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
