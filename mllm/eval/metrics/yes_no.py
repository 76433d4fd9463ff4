"""Did the model say yes or no, and how does that add up (POPE, MME)?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics.base import Metric, Score, Scored, mean
from mllm.eval.metrics.text import references


def gold_yes(target: Any) -> bool:
    """Whether a yes/no target says yes. Raises `DataError` for anything else."""
    word = references(target)[0].strip().lower().rstrip(".")
    if word not in ("yes", "no"):
        raise DataError(f"target {target!r} is neither yes nor no")
    return word == "yes"


def binary_counts(items: Sequence[Scored]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (yes positive) and yes-ratio of the predictions, in percent. A ratio whose
    denominator is 0 (nothing called yes, no yes to find) is 0. Unparsed answers are wrong and not called yes."""
    if not items:
        return dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), float("nan"))
    answered_yes = [item.score.parts.get("said_yes", 0.0) == 1.0 for item in items]
    gold = [gold_yes(item.target) for item in items]
    hits = sum(s and g for s, g in zip(answered_yes, gold))
    precision = hits / sum(answered_yes) if any(answered_yes) else 0.0
    recall = hits / sum(gold) if any(gold) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    accuracy = mean([item.value for item in items])
    values = {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": sum(answered_yes) / len(answered_yes),
    }
    return {name: 100 * value for name, value in values.items()}


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

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        groups: dict[str, list[Scored]] = {}
        for item in items:
            groups.setdefault(str(item.meta.get("category") or ""), []).append(item)
        each = {name: binary_counts(group) for name, group in groups.items()}
        pooled = binary_counts(items)
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

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        pairs: dict[str, dict[str, list[float]]] = {}
        for item in items:
            if "category" not in item.meta or "pair" not in item.meta:
                raise DataError(f"sample {item.id}: MME needs meta.category and meta.pair")
            pairs.setdefault(str(item.meta["category"]), {}).setdefault(str(item.meta["pair"]), []).append(item.value)
        odd, categories = 0, {}
        for category, images in pairs.items():
            whole = [values for values in images.values() if len(values) == 2]
            odd += len(images) - len(whole)
            accuracy = 100 * mean([value for values in images.values() for value in values])
            plus = 100 * mean([float(sum(values) == 2) for values in whole]) if whole else 0.0
            categories[category] = (accuracy, plus)

        def total(names: Sequence[str], pick: Callable[[tuple[float, float]], float] = sum) -> float:
            folded = {_fold(name) for name in names}
            return sum(pick(values) for name, values in categories.items() if _fold(name) in folded)

        result = {"score": sum(sum(values) for values in categories.values()) if categories else float("nan")}
        result |= {"perception": total(_MME_PERCEPTION), "cognition": total(_MME_COGNITION), "odd_pairs": float(odd)}
        for category, (accuracy, plus) in categories.items():
            result |= {f"{category}/acc": accuracy, f"{category}/acc_plus": plus, f"{category}/score": accuracy + plus}
        return result
