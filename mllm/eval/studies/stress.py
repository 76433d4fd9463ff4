"""How much of a benchmark can be answered without looking at the pictures?

A random forest that sees words only, trained and tested by k-fold on the benchmark itself ("test-set stress test",
arXiv 2511.04655). What it gets right, no picture was needed for; a model's score means what lies above.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm.errors import DataError, UnavailableError
from mllm.eval.data.loading import Item, TaskData
from mllm.eval.metrics.letters import gold_letters, option_texts
from mllm.eval.metrics.text import references
from mllm.eval.report.statistics import Estimate, mean_estimate
from mllm.install import install_hint

_MAX_ANSWERS = 200


@dataclass(frozen=True)
class StressResult:
    """accuracy: share answered right from words alone (0 to 1) with its interval; chance: uniform guessing over the
    options (0 for open questions); majority: always the commonest letter or answer; num_left_out: scored samples of the
    other kind; bias: per sample, the probability that the forest gives the right answer, by id; answered: ids that it
    answers right."""

    task: str
    kind: str
    accuracy: Estimate
    chance: float
    majority: float
    num_samples: int
    num_left_out: int
    bias: dict[str, float]
    answered: tuple[str, ...] = ()


def stress_test(data: TaskData, *, folds: int = 5, trees: int = 200, seed: int = 0) -> StressResult:
    """Answer a benchmark by a text-only random forest. Folds keep clusters (pictures, scenes) together, so that
    nothing is learnt from another question on the same picture. Raises `DataError` when there are too few scored
    samples."""
    try:
        from sklearn.model_selection import GroupKFold
    except ImportError:
        raise UnavailableError(f"the stress test needs scikit-learn: {install_hint('eval')}") from None
    items = [item for item in data.items if item.target is not None]
    choice = [item for item in items if item.meta.get("options")]
    open_ended = len(choice) < len(items) / 2
    used = [item for item in items if not item.meta.get("options")] if open_ended else choice
    clusters = [item.cluster or item.id for item in used]
    if len(used) < 2 * folds or len(set(clusters)) < folds:
        raise DataError(
            f"{data.task.name}: {len(used)} scored samples in {len(set(clusters))} clusters are too few for "
            f"{folds} folds"
        )
    probability, right = np.zeros(len(used)), np.zeros(len(used))
    ask = _open_fold if open_ended else _choice_fold
    for train, test in GroupKFold(folds).split(used, groups=clusters):
        p, r = ask([used[k] for k in train], [used[k] for k in test], trees, seed)
        probability[test], right[test] = p, r
    if open_ended:
        answers = [_normal(references(item.target)[0]) for item in used]
        chance, kind = 0.0, "open"
        majority = Counter(answers).most_common(1)[0][1] / len(used)
    else:
        letters = [sorted(gold_letters(item.target, option_texts(item.meta)))[0] for item in used]
        chance, kind = float(np.mean([1 / len(item.meta["options"]) for item in used])), "choice"
        majority = Counter(letters).most_common(1)[0][1] / len(used)
    estimate = mean_estimate(right.tolist(), clusters=clusters, binary=True)
    bias = {item.id: float(p) for item, p in zip(used, probability)}
    answered = tuple(item.id for item, r in zip(used, right) if r)
    left_out = len(items) - len(used)
    return StressResult(data.task.name, kind, estimate, chance, majority, len(used), left_out, bias, answered)


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _forest(trees: int, seed: int):
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(trees, min_samples_leaf=1, max_features="sqrt", random_state=seed, n_jobs=1)


def _words(texts: Sequence[str]):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), min_df=1, max_features=5000, token_pattern=r"(?u)\b\w+\b").fit(texts)


def _open_fold(train: Sequence[Item], test: Sequence[Item], trees: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Question (and category) → one of the training answers."""
    words = _words([_question(item) for item in train])
    answers = [_normal(references(item.target)[0]) for item in train]
    kept = {answer for answer, _ in Counter(answers).most_common(_MAX_ANSWERS)}
    labels = [answer if answer in kept else "\0rare" for answer in answers]
    forest = _forest(trees, seed).fit(words.transform([_question(item) for item in train]), labels)
    table = forest.predict_proba(words.transform([_question(item) for item in test]))
    places = {name: k for k, name in enumerate(forest.classes_)}
    gold = [{_normal(reference) for reference in references(item.target)} for item in test]
    best = [forest.classes_[k] for k in table.argmax(1)]
    probability = [
        max((table[row, places[g]] for g in answers if g in places), default=0.0) for row, answers in enumerate(gold)
    ]
    return np.array(probability), np.array([float(b in g) for b, g in zip(best, gold)])


def _choice_fold(train: Sequence[Item], test: Sequence[Item], trees: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(question, option) → right or not; the likeliest option of a question is its answer."""
    from scipy.sparse import csr_matrix, hstack

    words = _words([_question(item) for item in train] + [text for item in train for text in item.meta["options"]])
    frequency = Counter(_normal(item.meta["options"][k]) for item in train for k in _gold(item))

    def table(items: Sequence[Item]):
        pairs = [(item, k) for item in items for k in range(len(item.meta["options"]))]
        shape = csr_matrix(np.array([_surface(item, k, frequency) for item, k in pairs]))
        options = words.transform([item.meta["options"][k] for item, k in pairs])
        return hstack([options, words.transform([_question(item) for item, _ in pairs]), shape]).tocsr()

    labels = [k in _gold(item) for item in train for k in range(len(item.meta["options"]))]
    forest = _forest(trees, seed).fit(table(train), labels)
    column = list(forest.classes_).index(True)
    scores = forest.predict_proba(table(test))[:, column]
    probability, right, start = [], [], 0
    for item in test:
        mine = scores[start : start + len(item.meta["options"])]
        start += len(mine)
        total = mine.sum()
        gold = _gold(item)
        probability.append(sum(mine[k] for k in gold) / total if total else len(gold) / len(mine))
        right.append(float(int(mine.argmax()) in gold))
    return np.array(probability), np.array(right)


def _question(item: Item) -> str:
    return f"{item.question} {item.category or ''}"


def _gold(item: Item) -> list[int]:
    return [ord(letter) - ord("A") for letter in gold_letters(item.target, option_texts(item.meta))]


def _surface(item: Item, position: int, frequency: Counter[str]) -> list[float]:
    """What an option gives away without being understood: place, length among its rivals, words shared with the
    question, how often it was right before."""
    options = [str(option) for option in item.meta["options"]]
    lengths = [len(option) for option in options]
    mine = options[position]
    question, words = set(_normal(item.question).split()), set(_normal(mine).split())
    rank = sum(length < lengths[position] for length in lengths) / max(len(options) - 1, 1)
    shared = len(question & words) / max(len(words), 1)
    rivals = [set(_normal(other).split()) for k, other in enumerate(options) if k != position]
    likeness = sum(len(words & other) / max(len(words | other), 1) for other in rivals) / max(len(rivals), 1)
    number = float(mine.replace(",", "")) if mine.replace(",", "").replace(".", "", 1).isdigit() else math.nan
    numeric = 0.0 if math.isnan(number) else 1.0
    return [position, len(mine), rank, shared, likeness, numeric, frequency[_normal(mine)]]
