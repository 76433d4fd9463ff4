"""How many questions can be answered from a tokenizer's quantised features alone?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import DataError
from mllm.pictures import load_image
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.evaluate import code_features, predict_linear
from mllm.visual_tokenizers.images import ImageSource, Split


@dataclass
class QuestionSet:
    """Images and questions about them; ``questions`` holds (index of the image, kind, question, answer)."""

    images: ImageSource
    questions: list[tuple[int, str, str, str]]


class _Pictures(ImageSource):
    def __init__(self, images: Tensor, split: Split):
        super().__init__(None, images.shape[-1], split)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]


def class_questions(images: ImageSource) -> QuestionSet:
    """Which digit, or which class, each image shows. Raises `DataError` for images without classes."""
    if images.labels is None:
        raise DataError("questions: these images have no classes; give a JSONL file of image, question and answer")
    questions = []
    for index, label in enumerate(images.labels.tolist()):
        name = images.classes[label]
        digit = name.isdigit() and len(name) == 1
        question = "Which digit is this?" if digit else "What is this?"
        questions.append((index, "digit" if digit else "class", question, name))
    return QuestionSet(images, questions)


def read_questions(path: Path, size: int, *, held_out: int = 5) -> tuple[QuestionSet, QuestionSet]:
    """Training and held-out questions of a JSONL file of ``image`` (relative to the file), ``question``, ``answer`` and
    optionally ``kind``; every ``held_out``-th image, with all its questions, is held out.

    Raises `DataError` naming the line of a missing image or key.
    """
    if not path.is_file():
        raise DataError(f"questions: {path} is no file")
    rows: dict[Path, list[tuple[str, str, str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, question, answer = (str(row[key]) for key in ("image", "question", "answer"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: needs image, question and answer ({error})") from error
        file = path.parent / Path(image).expanduser()
        if not file.is_file():
            raise DataError(f"{path}, line {number}: image {file} does not exist")
        rows.setdefault(file, []).append((str(row.get("kind", "question")), question, answer))
    if len(rows) < held_out:
        raise DataError(f"{path}: {len(rows)} images; at least {held_out} are needed to hold some out")
    halves: tuple[list, list] = ([], [])
    for index, (file, questions) in enumerate(rows.items()):
        halves[index % held_out == held_out - 1].append((_read(file, size), questions))
    first, second = (gather_questions(half, split) for half, split in zip(halves, ("train", "held_out")))
    return first, second


def answer_questions(
    tokenizer: VisualTokenizer, train: QuestionSet, held_out: QuestionSet, *, width: int = 48, batch_size: int = 64
) -> dict[str, dict[str, dict[str, int]]]:
    """Correct held-out answers of one linear reader: ``codes`` (each position's quantised features), ``blank`` (question
    alone) and ``pixels`` (averaged to about as many numbers) → kind or ``total`` → ``correct``, ``n``.

    The reader is a penalised logistic regression on the question's words, the features' first ``width`` principal
    components (fitted on the training images), and their products. An answer never seen in training counts as wrong.
    """
    if not train.questions or not held_out.questions:
        raise DataError("questions: training and held-out part both need questions")
    codes = [
        code_features(tokenizer, part.images, pool=False, batch_size=batch_size)["all"] for part in (train, held_out)
    ]
    pixels = [_small_pixels(part.images, codes[0].shape[1]) for part in (train, held_out)]
    words = sorted({word for _, _, text, _ in train.questions for word in _words(text)})
    answers = {answer: i for i, answer in enumerate(sorted({row[3] for row in train.questions}))}
    bags = [_bag(part, words) for part in (train, held_out)]
    labels = torch.tensor([answers[row[3]] for row in train.questions])
    result = {}
    for name, features in (("codes", codes), ("blank", None), ("pixels", pixels)):
        if features is None:
            inputs = bags
        else:
            reduced = _principal(features[0], features[1], width)
            inputs = [_joined(part, bag, f) for part, bag, f in zip((train, held_out), bags, reduced)]
        predicted = predict_linear(inputs[0], labels, inputs[1], decay=1e-2).tolist()
        right, total = Counter(), Counter()
        for row, guess in zip(held_out.questions, predicted):
            for kind in (row[1], "total"):
                total[kind] += 1
                right[kind] += answers.get(row[3]) == guess
        result[name] = {kind: {"correct": right[kind], "n": n} for kind, n in total.items()}
    return result


def gather_questions(drawn: list[tuple[np.ndarray, list[tuple[str, str, str]]]], split: Split) -> QuestionSet:
    """Images ``(size, size, 3)`` uint8, each with its (kind, question, answer) rows, as one set."""
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    return QuestionSet(
        _Pictures(images, split), [(i, *row) for i, (_, questions) in enumerate(drawn) for row in questions]
    )


def _read(path: Path, size: int) -> np.ndarray:
    return np.array(load_image(path, where=str(path)).resize((size, size), Image.Resampling.BICUBIC))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _bag(part: QuestionSet, words: list[str]) -> Tensor:
    place = {word: i for i, word in enumerate(words)}
    bag = torch.zeros(len(part.questions), len(words), dtype=torch.float64)
    for row, (_, _, text, _) in enumerate(part.questions):
        for word in _words(text):
            if word in place:
                bag[row, place[word]] = 1
    return bag


def _small_pixels(images: ImageSource, numbers: int) -> Tensor:
    side = min(images.size, max(1, round((numbers / 3) ** 0.5)))
    parts = [images.batch(range(i, min(i + 64, len(images)))).float() / 255 for i in range(0, len(images), 64)]
    return torch.cat([F.adaptive_avg_pool2d(part, side).flatten(1) for part in parts])


def _principal(train: Tensor, test: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both on the first ``width`` principal axes of ``train`` ``(n, D)``, from the smaller of its two Gram matrices."""
    mean = train.double().mean(0)
    train, test = train.double() - mean, test.double() - mean
    if train.shape[1] <= train.shape[0]:
        axes = torch.linalg.eigh(train.T @ train)[1].flip(1)[:, :width]
    else:
        values, vectors = torch.linalg.eigh(train @ train.T)
        values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
        axes = train.T @ vectors / values.clamp_min(1e-12).sqrt()
    return train @ axes, test @ axes


def _joined(part: QuestionSet, bag: Tensor, features: Tensor) -> Tensor:
    seen = features[[row[0] for row in part.questions]]
    return torch.cat([bag, seen, (bag[:, :, None] * seen[:, None]).flatten(1)], 1)
