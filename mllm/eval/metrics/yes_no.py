"""Did the model say yes or no, and how does that add up (POPE, MME)?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean, ratio
from mllm.eval.metrics.text import references


def gold_yes(target: Any) -> bool:
    """Whether a yes/no target says yes. Raises `DataError` for anything else."""
    word = references(target)[0].strip().lower().rstrip(".")
    if word not in ("yes", "no"):
        raise DataError(f"target {target!r} is neither yes nor no")
    return word == "yes"


class YesNoCounts:
    """What answers add up to where one word is looked for, told answer by answer: of a million none is kept. Unparsed answers are
    wrong and not that word."""

    def __init__(self, wanted: Literal["yes", "no"] = "yes"):
        self._yes = wanted == "yes"
        self._count = self._said = self._gold = self._hits = 0
        self._right = 0.0

    def append(self, item: Scored) -> None:
        """One more answer. Raises `DataError` where the target is neither yes nor no."""
        said, gold = item.score.parts.get("said_yes") == float(self._yes), gold_yes(item.target) == self._yes
        self._count, self._right = self._count + 1, self._right + item.value
        self._said, self._gold, self._hits = self._said + said, self._gold + gold, self._hits + (said and gold)

    def percent(self) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and the share that is said; NaN without answers. A ratio whose denominator is 0 (nothing
        called so, none to find) is 0."""
        if not self._count:
            return dict.fromkeys(("accuracy", "precision", "recall", "f1", "said"), float("nan"))
        precision = self._hits / self._said if self._said else 0.0
        recall = self._hits / self._gold if self._gold else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        values = {"accuracy": self._right / self._count, "precision": precision, "recall": recall, "f1": f1}
        return {name: 100 * value for name, value in (values | {"said": self._said / self._count}).items()}


def said_and_wanted(item: Scored, word: Literal["yes", "no"]) -> tuple[float, ...]:
    """1, said, wanted, and both: of one answer."""
    said, gold = item.score.parts.get("said_yes") == float(word == "yes"), gold_yes(item.target) == (word == "yes")
    return 1.0, float(said), float(gold), float(said and gold)


def f1(counts: np.ndarray) -> np.ndarray:
    """``(n,)``, 0 to 1, of ``(n, 4)`` sums of `said_and_wanted`."""
    precision, recall = ratio(counts[:, 3], counts[:, 1]), ratio(counts[:, 3], counts[:, 2])
    return ratio(2 * precision * recall, precision + recall)


def yes_no_counts(
    items: Sequence[Scored], wanted: Literal["yes", "no"] = "yes"
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """`YesNoCounts.percent` of all answers, and by category in order of first appearance (``""``: answers without one)."""
    whole, groups = YesNoCounts(wanted), dict[str, YesNoCounts]()
    for item in items:
        for counts in (whole, groups.setdefault(str(item.meta.get("category") or ""), YesNoCounts(wanted))):
            counts.append(item)
    return whole.percent(), {name: counts.percent() for name, counts in groups.items()}


class PopeOfficial(Metric):
    """Headline: F1, mean over the categories (random, popular, adversarial) as papers quote it."""

    name = "pope_official"
    protocol = (
        "POPE: 'no' if the first sentence holds the token No, no or not, else yes; F1 averaged over the categories"
    )
    is_mean = False

    def read(self, prediction: str) -> tuple[bool | None, str]:
        """(said yes?, rule)."""
        words = prediction.split(".")[0].replace(",", "").split(" ")
        found = [word for word in ("No", "no", "not") if word in words]
        return (False, f"token {found[0]!r}") if found else (True, "no token No, no, not")

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        gold = gold_yes(target)
        yes, rule = self.read(prediction)
        if yes is None:
            return Score(None, "", rule)
        return Score(float(yes == gold), "yes" if yes else "no", rule, {"said_yes": float(yes)})

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return str(item.meta.get("category") or ""), said_and_wanted(item, "yes")

    def headline(self, parts: np.ndarray) -> float:
        return self.scale * mean(f1(parts[parts[:, 0] > 0]))

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        pooled, each = yes_no_counts(items)
        for counts in (pooled, *each.values()):
            counts["yes_ratio"] = counts.pop("said")
        result = {"score": mean([counts["f1"] for counts in each.values()])} | pooled
        result["f1_pooled"] = result.pop("f1")
        if set(each) - {""}:
            result |= {f"{name}/{key}": value for name, counts in each.items() for key, value in counts.items()}
        return result


class PopeStrict(PopeOfficial):
    name = "pope_strict"
    protocol = "POPE, strict: exactly one of the words yes and no (any case) must occur, else unparsed"

    def read(self, prediction: str) -> tuple[bool | None, str]:
        words = set(re.findall(r"[a-z']+", prediction.lower()))
        yes, no = "yes" in words, "no" in words
        return (
            (yes, f"word {'yes' if yes else 'no'}")
            if yes != no
            else (None, "both yes and no" if yes else "neither yes nor no")
        )


_MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
_MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _fold(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


class Mme(Metric):
    """Per category: acc (percent of questions) + acc+ (percent of images with every question right). ``meta`` needs
    ``category`` and ``pair`` (the image). An image without exactly two questions (a limited run) is named in
    ``odd_pairs`` and takes no part in acc+."""

    name = "mme"
    group_key = "pair"
    protocol = "MME: yes/no from the first four characters; acc + acc+ per category; perception and cognition are sums"
    is_mean = False
    unit = "points"

    def read(self, prediction: str) -> tuple[bool | None, str]:
        text = prediction.lower().strip().replace(".", "")
        if text in ("yes", "no"):
            return text == "yes", "whole reply"
        if text in ("y", "n"):
            return text == "y", "single letter"
        start = text[:4]
        if "yes" in start or "no" in start:
            return "yes" in start, "first four characters"
        return None, "other"

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        gold = gold_yes(target)
        yes, rule = self.read(prediction)
        return Score(None, "", rule) if yes is None else Score(float(yes == gold), "yes" if yes else "no", rule)

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]]:
        return str(item.meta["category"]), (1.0, item.value)

    def joined(self, sums: np.ndarray) -> np.ndarray:
        asked, right = sums.T
        return np.stack([asked, right, asked == 2, (asked == 2) & (right == 2)], axis=1).astype(float)

    def headline(self, parts: np.ndarray) -> float:
        asked, right, whole, plus = parts[parts[:, 0] > 0].T
        return float(100 * (ratio(right, asked) + ratio(plus, whole)).sum()) if len(asked) else float("nan")

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        pairs: dict[str, dict[str, tuple[float, int]]] = {}  # category → image → (right, asked)
        for item in items:
            if "category" not in item.meta or "pair" not in item.meta:
                raise DataError(f"sample {item.id}: MME needs meta.category and meta.pair")
            images, image = pairs.setdefault(str(item.meta["category"]), {}), str(item.meta["pair"])
            right, asked = images.get(image, (0.0, 0))
            images[image] = right + item.value, asked + 1
        odd, categories = 0, {}
        for category, images in pairs.items():
            whole = [right for right, asked in images.values() if asked == 2]
            odd += len(images) - len(whole)
            accuracy = 100 * sum(right for right, _ in images.values()) / sum(asked for _, asked in images.values())
            plus = 100 * mean(float(right == 2) for right in whole) if whole else 0.0
            categories[category] = (accuracy, plus)

        def total(names: Sequence[str], pick: Callable[[tuple[float, float]], float] = sum) -> float:
            folded = {_fold(name) for name in names}
            return sum(pick(values) for name, values in categories.items() if _fold(name) in folded)

        result = {"score": sum(sum(values) for values in categories.values()) if categories else float("nan")}
        result |= {"perception": total(_MME_PERCEPTION), "cognition": total(_MME_COGNITION), "odd_pairs": float(odd)}
        for category, (accuracy, plus) in categories.items():
            result |= {f"{category}/acc": accuracy, f"{category}/acc_plus": plus, f"{category}/score": accuracy + plus}
        return result
