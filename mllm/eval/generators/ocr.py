"""What does a language model answer that never sees a picture, only the words an OCR engine reads in it? A baseline without training."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm.damage import opening
from mllm.errors import UnavailableError
from mllm.eval.generators.base import GeneratorSettings
from mllm.eval.generators.hf import HFGenerator
from mllm.install import install_hint
from mllm.parts.get import is_part, part_folder
from mllm.types import IMAGE_MARK, Request, Response, Turn

_INTRODUCTION = "Text in the picture, line by line:"
_NOTHING = "(no text)"
_SHOWN = "Fruit sold in 1998\nApples  12\nPears  31\nFigs  7"
_EXAMPLES = (
    ("What is the value for Pears?", "31"),
    ("Which has the lowest value?", "Figs"),
    ("Is Apples higher than Pears?", "no"),
    ("What is the value for Plums?", "not in the chart"),
)
"""The language model was never shown the form of answers. Without examples it writes sentences, all of which are wrong by their form: of
96 answers to charts none was right, though numbers stood in them."""


@dataclass(frozen=True)
class Word:
    """A piece of text and where it stands: centre in pixels, height."""

    text: str
    x: float
    y: float
    height: float


def lines_of(words: Iterable[Word]) -> list[str]:
    """Words in reading order: those whose centres lie within half a height of one another are a line, from the left."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda one: (one.y, one.x)):
        last = lines[-1][0] if lines else None
        if last is not None and abs(word.y - last.y) <= 0.5 * max(word.height, last.height):
            lines[-1].append(word)
        else:
            lines.append([word])
    return ["  ".join(word.text for word in sorted(line, key=lambda one: one.x)) for line in lines]


class RapidReader:
    """PP-OCR's detector and recogniser by the package rapidocr (Apache-2.0, weights included), on the CPU."""

    def __init__(self) -> None:
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UnavailableError(f"generator ocr: reads with the package {package}: {install_hint('ocr')}")
        rapidocr: Any = importlib.import_module("rapidocr")
        self.version = importlib.metadata.version("rapidocr")
        self._engine = rapidocr.RapidOCR(params={"Global.log_level": "error"})

    def read(self, picture: Any) -> list[Word]:
        """The words of a picture (PIL)."""
        found = self._engine(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1]))
        words = []
        for box, text in zip(found.boxes if found.boxes is not None else (), found.txts or ()):
            corners = np.asarray(box, dtype=float)
            (x, y), height = corners.mean(0), float(np.ptp(corners[:, 1]))
            words.append(Word(str(text), float(x), float(y), height))
        return words


class KeptReadings:
    """The lines that one version of a reader found, by picture, on disk: reading takes seconds a picture on a CPU, several questions are
    asked of one, and an evaluation that was cut short or is asked another model goes on where it was."""

    def __init__(self, reader: str | None):
        """reader: its name with its version, whose readings alone are used; None: of no known version, kept in memory only."""
        self.path: Path | None = None
        self._known: dict[str, list[str]] = {}
        if reader is not None:
            name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in reader)
            self.path = Path(os.environ.get("MLLM_CACHE", "~/.cache/mllm")).expanduser() / "ocr" / f"{name}.jsonl"
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["picture"]] = row["lines"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill left unfinished; its picture is read again

    def get(self, key: str) -> list[str] | None:
        """Lines of a picture by its hash; None: not read yet."""
        return self._known.get(key)

    def add(self, key: str, lines: list[str]) -> list[str]:
        """Keep what was read; the same lines."""
        self._known[key] = lines
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = json.dumps({"picture": key, "lines": lines}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{row}\n")  # a line of its own, whatever a kill left before it
        return lines


class TextGenerator(HFGenerator):
    """A language model without pictures, asked through its tokenizer's chat template."""

    def render(self, request: Request) -> str:
        """The prompt as the model reads it."""
        turns = [{"role": turn.role, "content": turn.content} for turn in request.turns]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _encode(self, requests: Sequence[Request], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        first = {"add_special_tokens": False} if self._starts_itself(prompts[0]) else {}
        inputs = self.processor(list(prompts), padding=True, padding_side="left", return_tensors="pt", **first)
        return {key: value.to(self.model.device) for key, value in inputs.items() if key != "token_type_ids"}


class OcrGenerator:
    """A text-only language model, asked with what the reader found in place of each picture.

    The checkpoint is a causal language model of transformers: a folder, a hub id, or ``package:NAME`` (`mllm parts ls`).
    """

    def __init__(self, model: TextGenerator, reader: Any):
        self.model, self.reader = model, reader
        self.name, self.batch_size = model.name.replace("hf:", "ocr:", 1), model.batch_size
        self.kept = KeptReadings(self._reader_name() if getattr(reader, "version", "") else None)

    @classmethod
    def open(cls, checkpoint: str, settings: GeneratorSettings) -> OcrGenerator:
        """Raises `UnavailableError` where the OCR engine is not installed."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        reader = RapidReader()
        source = str(part_folder(checkpoint)) if is_part(checkpoint) else checkpoint
        with opening(source) if not is_part(checkpoint) else nullcontext():
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, settings.dtype))
            tokenizer = AutoTokenizer.from_pretrained(source)
        place = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"hf:{checkpoint.rpartition('/')[2]}"
        model = TextGenerator(model.to(torch.device(place)), tokenizer, batch_size=settings.batch_size, name=name)
        return cls(model, reader)

    def fingerprint(self) -> str:
        """The language model's, the OCR engine's version and what the model is shown beforehand."""
        shown = hashlib.sha256(repr((_INTRODUCTION, _NOTHING, _SHOWN, _EXAMPLES)).encode()).hexdigest()[:8]
        return f"ocr:{self._reader_name()}:{shown}:{self.model.fingerprint()}"

    def _reader_name(self) -> str:
        return f"{type(self.reader).__name__}:{getattr(self.reader, 'version', '')}"

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Answers to the questions below the words of their pictures; a picture that cannot be read gives an error."""
        failed: list[Response] = []

        def written() -> Iterator[Request]:
            for request in requests:
                try:
                    yield self._in_words(request)
                except Exception as error:  # of one picture; the others are still asked
                    failed.append(Response(request.id, "", error=f"{type(error).__name__}: {error}"))

        yield from self.model.generate(written())
        yield from failed

    def _in_words(self, request: Request) -> Request:
        pictures, turns = iter(request.images), list(_examples())
        for turn in request.turns:
            first, *rest = turn.content.split(IMAGE_MARK)
            content = first + "".join(f"{self._words(next(pictures))}\n\n{part.lstrip()}" for part in rest)
            turns.append(replace(turn, content=content))
        return replace(request, turns=turns, images=[])

    def _words(self, picture: Any) -> str:
        key = hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).hexdigest()
        lines = self.kept.get(key)
        if lines is None:
            lines = self.kept.add(key, lines_of(self.reader.read(picture)))
        return "\n".join([_INTRODUCTION, *(lines or [_NOTHING])])


def _examples() -> Iterator[Turn]:
    for number, (question, answer) in enumerate(_EXAMPLES):
        yield Turn("user", f"{_INTRODUCTION}\n{_SHOWN}\n\n{question}" if number == 0 else question)
        yield Turn("assistant", answer)
