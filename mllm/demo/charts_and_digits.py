"""What does the demo learn from? Charts and handwritten digits made here from real tables, without a download."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.conversations import picture_messages
from mllm.data.lookup import load_mixture
from mllm.data.parallel import chunks, spread
from mllm.demo.charts import ANSWER_TYPES, KINDS, Balance, Chart, Question, Renderer, caption, questions
from mllm.demo.tables import draw_chart
from mllm.errors import UnavailableError
from mllm.install import install_hint
from mllm.recipe import Recipe, StageSpec

DATA = Path("runs/demo/data")
"""Where the declarations in ``data/`` and ``eval/`` expect the demo's files."""
VERSION = 2
"""Raised when the data that a seed gives changes."""
SHARES = {"colour": 0.22, "extreme": 0.22, "count": 0.18, "comparison": 0.14, "trend": 0.12, "value": 0.12}
TOKENIZER_TEXT = ("charts/captions.jsonl", "charts/train.jsonl", "digits/train.jsonl")
CAPTION_REQUEST = "Describe the chart."
DIGIT_QUESTIONS = ("Which digit is this?", "What digit is shown?", "Read the digit.")


@dataclass(frozen=True)
class DemoData:
    """Where the demo's files are and how many samples they hold."""

    charts_train: Path
    charts_test: Path
    digits_train: Path
    digits_test: Path
    counts: dict[str, int]
    """File (``charts/train.jsonl`` …) → rows."""
    written: bool
    """False: everything was there already."""


def read_from(recipe: Recipe, root: Path | str, *, declared: Path = DATA) -> Recipe:
    """The recipe with the demo's own data sets, which their declarations place in ``declared``, read from another folder."""
    if Path(root) == declared:
        return recipe
    return recipe.model_copy(update={"stages": [_stage_from(stage, Path(root), declared) for stage in recipe.stages]})


def _stage_from(stage: StageSpec, root: Path, declared: Path) -> StageSpec:
    mixture = load_mixture(stage.data, where=f"stages.{stage.name}.data")
    moved = [
        item.model_copy(update={"dataset": _dataset_from(item.dataset, root, declared)}) for item in mixture.datasets
    ]
    if moved == mixture.datasets:
        return stage
    plain = mixture.model_copy(update={"datasets": moved}).model_dump(mode="json", exclude_defaults=True)
    return stage.model_copy(update={"data": plain})


def _dataset_from(dataset: Any, root: Path, declared: Path) -> Any:
    path = Path(dataset.path or "")
    if not path.is_relative_to(declared):
        return dataset
    return dataset.model_copy(update={"path": str(root / path.relative_to(declared))})


def prepare_demo(
    output_dir: Path | str = DATA,
    *,
    num_charts: int = 3000,
    num_test_charts: int = 300,
    seed: int = 0,
    size: int = 112,
    digits_size: int = 64,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> DemoData:
    """Write ``{charts,digits}/{train,test}.jsonl`` with PNG images beside them, and ``manifest.json``.

    Charts (bar, line, pie, scatter; half of them from scikit-learn's tables) train with up to four questions each as
    one conversation, and with a caption each in ``charts/captions.jsonl``; test charts have other random tables and
    other column pairs of the real ones, and two questions each, whose answers are balanced within every question
    template. Digits are scikit-learn's 1797 handwritten ones, 80 / 20 by class. Rows are messages (`MessagesSource`);
    test rows also carry ``image, question, answer, kind, answer_type``. Deterministic by seed; does nothing when the
    manifest's settings and hashes fit what is on disk. progress: called with (done, total) images.
    """
    root = Path(output_dir)
    settings = {
        "version": VERSION,
        "num_charts": num_charts,
        "num_test_charts": num_test_charts,
        "seed": seed,
        "size": size,
        "digits_size": digits_size,
    }
    _require_libraries()
    known = _complete(root, settings)
    if known is not None:
        return _data(root, known, written=False)
    for folder in ("charts", "digits"):
        if (root / folder).is_dir():
            shutil.rmtree(root / folder)
    (root / "manifest.json").unlink(missing_ok=True)

    jobs: list[tuple[Path, Chart]] = []
    rows = {
        "charts/train.jsonl": _chart_rows(root, "train", num_charts, seed, jobs),
        "charts/test.jsonl": _chart_rows(root, "test", num_test_charts, seed, jobs),
    }
    rows["charts/captions.jsonl"] = [
        {
            "id": f"charts-caption-{path.stem}",
            "messages": picture_messages(f"train/{path.name}", [(CAPTION_REQUEST, caption(chart))]),
            "chart": chart.type,
        }
        for path, chart in jobs
        if path.parent.name == "train"
    ]
    images = {**_render(jobs, size, processes, progress), **_digit_images(root, digits_size, seed, rows)}
    manifest = {"settings": settings, "files": {}, "images": _digest_images(root, images.items())}
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (root / name).write_text(text, encoding="utf-8")
        manifest["files"][name] = {"rows": len(content), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest["num_images"] = len(images)
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return _data(root, manifest, written=True)


def _chart_rows(root: Path, split: str, count: int, seed: int, jobs: list[tuple[Path, Chart]]) -> list[dict[str, Any]]:
    """Rows of a split; appends (file, chart) to draw. Kinds keep their shares, answers of a template stay level."""
    rng = random.Random(f"charts/{split}/{seed}")
    balance = Balance(SHARES)
    training = split == "train"
    rows: list[dict[str, Any]] = []
    number = 0
    folder = root / "charts" / split
    folder.mkdir(parents=True, exist_ok=True)
    while number < count:
        chart = draw_chart(rng, split)
        chosen = balance.choose(questions(chart), 4 if training else 2, rng, slack=None if training else 2)
        if len(chosen) < (1 if training else 2):
            continue
        name = f"{split}/{number:05d}.png"
        jobs.append((root / "charts" / name, chart))
        extra = {"chart": chart.type, "source": chart.source}
        if training:
            rng.shuffle(chosen)
            # Other questions name the only colour: they must not come before it is asked for.
            if len(chart.colours) == 1:
                chosen.sort(key=lambda question: question.kind != "colour")
            exchanges = [(question.text, question.answer) for question in chosen]
            rows.append(
                {
                    "id": f"charts-{split}-{number:05d}",
                    "messages": picture_messages(name, exchanges),
                    **extra,
                }
            )
        else:
            for place, question in enumerate(chosen):
                row = _test_row(f"charts-{split}-{number:05d}-{place}", name, question, ANSWER_TYPES[question.kind])
                rows.append({**row, **extra})
        number += 1
    return rows


def _test_row(identity: str, image: str, question: Question, answer_type: str) -> dict[str, Any]:
    return {
        "id": identity,
        "image": image,
        "question": question.text,
        "answer": question.answer,
        "kind": question.kind,
        "answer_type": answer_type,
        "messages": picture_messages(image, [(question.text, question.answer)]),
    }


def _render(
    jobs: list[tuple[Path, Chart]], size: int, processes: int, progress: Callable[[int, int], None] | None
) -> dict[Path, str]:
    parts = [[jobs[i] for i in part] for part in chunks(len(jobs), 100)]
    hashes: dict[Path, str] = {}

    def collect(results: Iterable[list[tuple[Path, str]]]) -> None:
        for part in results:
            hashes.update(part)
            if progress:
                progress(len(hashes), len(jobs))

    collect(spread(partial(_render_part, size), parts, processes))
    return hashes


_renderers: dict[int, Renderer] = {}


def _render_part(size: int, part: list[tuple[Path, Chart]]) -> list[tuple[Path, str]]:
    renderer = _renderers.setdefault(size, Renderer(size)) if size not in _renderers else _renderers[size]
    return [(path, _save(path, renderer.draw(chart))) for path, chart in part]


def _save(path: Path, pixels: np.ndarray) -> str:
    """Write a PNG; returns its sha256."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=3)
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _digit_images(root: Path, size: int, seed: int, rows: dict[str, list[dict[str, Any]]]) -> dict[Path, str]:
    """Write the digits and fill in their rows; returns file → hash."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    rng = random.Random(f"digits/{seed}")
    test: set[int] = set()
    for digit in range(10):
        members = np.flatnonzero(digits.target == digit).tolist()
        test.update(rng.sample(members, round(len(members) / 5)))
    hashes: dict[Path, str] = {}
    rows["digits/train.jsonl"], rows["digits/test.jsonl"] = [], []
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target.tolist())):
        split = "test" if number in test else "train"
        name = f"{split}/{number:04d}.png"
        path = root / "digits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        large = grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
        hashes[path] = _save(path, np.asarray(large))
        question = Question("digit", "digit", rng.choice(DIGIT_QUESTIONS), str(digit))
        identity = f"digits-{number:04d}"
        if split == "train":
            row: dict[str, Any] = {
                "id": identity,
                "messages": picture_messages(name, [(question.text, question.answer)]),
            }
        else:
            row = _test_row(identity, name, question, "number")
        rows[f"digits/{split}.jsonl"].append(row)
    rng.shuffle(rows["digits/test.jsonl"])
    return hashes


def _digest_images(root: Path, hashes: Iterable[tuple[Path, str]]) -> str:
    """One hash over all images' names and hashes."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {digest}\n" for path, digest in hashes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _complete(root: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, when settings, every file's hash and every image's hash fit it."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        if manifest["settings"] != settings:
            return None
        for name, entry in manifest["files"].items():
            if hashlib.sha256((root / name).read_bytes()).hexdigest() != entry["sha256"]:
                return None
        images = sorted(root.glob("*/*/*.png"))
        if len(images) != manifest["num_images"]:
            return None
        found = ((path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in images)
        return manifest if _digest_images(root, found) == manifest["images"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _data(root: Path, manifest: dict[str, Any], *, written: bool) -> DemoData:
    return DemoData(
        charts_train=root / "charts/train.jsonl",
        charts_test=root / "charts/test.jsonl",
        digits_train=root / "digits/train.jsonl",
        digits_test=root / "digits/test.jsonl",
        counts={name: entry["rows"] for name, entry in manifest["files"].items()},
        written=written,
    )


def _require_libraries() -> None:
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        try:
            __import__(module)
        except ImportError:
            raise UnavailableError(f"the demo's data needs {package}: {install_hint('train')}") from None


def train_tokenizer(data_dir: Path | str, output_dir: Path | str, *, vocab_size: int = 512) -> Path:
    """A byte-level BPE tokenizer (with the Vicuna template, in which an answer follows a space, as words inside a text
    do) learned from the demo's own training text, saved for transformers.

    Deterministic; does nothing when ``output_dir`` holds the tokenizer of the same text. Returns ``output_dir``.
    """
    root, output = Path(data_dir), Path(output_dir)
    text = [path.read_text(encoding="utf-8") for path in (root / name for name in TOKENIZER_TEXT)]
    stamp = hashlib.sha256("\n".join([str(VERSION), str(vocab_size), *text]).encode()).hexdigest()
    mark = output / "trained_on.txt"
    if mark.is_file() and mark.read_text() == stamp:
        return output
    learn_bpe(_texts(text), vocab_size).save_pretrained(str(output))
    mark.write_text(stamp)
    return output


def learn_bpe(lines: Iterable[str], vocab_size: int, *, template: str = "vicuna", max_length: int = 4096) -> Any:
    """A byte-level BPE tokenizer learned from ``lines``, with a shipped chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mllm.processing.template import read_template

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        model_max_length=max_length,
    )
    fast.chat_template = read_template(template)
    return fast


def _texts(files: Iterable[str]) -> Iterable[str]:
    """What is said in the training conversations, as the chat template writes it."""
    for content in files:
        for line in content.splitlines():
            for message in json.loads(line)["messages"]:
                parts = message["content"]
                text = parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts)
                yield f"{message['role'].upper()}: {text.strip()} "


assert set(SHARES) == set(KINDS)
