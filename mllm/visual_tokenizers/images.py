"""Which images does a tokenizer train on?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mllm.config import StrictModel, validate
from mllm.errors import DataError, UnavailableError
from mllm.install import install_hint
from mllm.pictures import load_image
from mllm.registry import Registry
from mllm.visual_tokenizers.recipe import ImagesSpec

_HERE = "mllm.visual_tokenizers.images"

IMAGE_SOURCES: Registry = Registry(
    "image source",
    {"folder": f"{_HERE}:FolderImages", "digits_and_charts": f"{_HERE}:DigitsAndCharts"},
)


Split = Literal["train", "held_out"]


class ImageSource:
    """Square RGB images of one size, with a class for each where there are classes."""

    Options: ClassVar[type[StrictModel]] = StrictModel
    labels: Tensor | None = None
    """``(len,)`` int64."""
    classes: tuple[str, ...] = ()

    def __init__(self, options: Any, size: int, split: Split):
        """size: side in pixels; split: ``train`` or ``held_out``, disjoint."""
        self.options, self.size = options, size
        self.split: Split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 ``(B, 3, size, size)``."""
        raise NotImplementedError

    def contents(self, indices: Sequence[int]) -> list[str]:
        """16 hex digits for each image that change when the image does: what stored results are tied to."""
        return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in self.batch(indices)]

    def describe(self, index: int) -> str:
        """How errors name an image."""
        return f"image {index}"

    def identity(self) -> str:
        """Text that differs when the images do, as far as that is known without reading them."""
        return f"{type(self).__name__} {self.options!r} {self.size} {self.split} {len(self)}"


def load_images(spec: ImagesSpec, size: int, split: Split) -> ImageSource:
    """The images of a recipe. Raises `ConfigError` for unknown options and `DataError` for an empty source."""
    cls = IMAGE_SOURCES.get(spec.type)
    source = cls(validate(cls.Options, spec.options, where=f"data.options ({spec.type})"), size, split)
    if len(source) == 0:
        raise DataError(f"data ({spec.type}, {split}): no images with options {spec.options}")
    return source


def to_pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 → float in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def augment(pixels: Tensor, spec: ImagesSpec, generator: torch.Generator | None = None) -> Tensor:
    """Random crop (resized back, antialiased bicubic) and mirror, per image; drawn from ``generator``, else from torch's
    own on the CPU."""
    if spec.crop is None and not spec.flip:
        return pixels
    size, out = pixels.shape[-1], []
    for image in pixels:
        if spec.crop is not None:
            low, high = spec.crop
            side = max(1, round(size * (low + (high - low) * float(torch.rand((), generator=generator)))))
            top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for _ in range(2))
            image = image[:, top : top + side, left : left + side]
            image = F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(-1, 1)
        if spec.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        out.append(image)
    return torch.stack(out)


class FolderOptions(StrictModel):
    path: str
    held_out: int = Field(default=256, ge=1)
    """Images kept for evaluation: the last ones in an order shuffled with seed 0."""
    workers: int = Field(default=4, ge=1)


class FolderImages(ImageSource):
    """All JPEG, PNG and WebP files under a folder, shorter side to size, centre crop. A sub-folder is a class."""

    Options = FolderOptions

    def __init__(self, options: Any, size: int, split: Split):
        super().__init__(options, size, split)
        root = Path(options.path).expanduser()
        if not root.is_dir():
            raise DataError(f"data.options.path: {root} is no folder")
        suffixes = {".jpg", ".jpeg", ".png", ".webp"}
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)
        order = np.random.default_rng(0).permutation(len(files))
        files = [files[i] for i in order]
        kept = min(options.held_out, len(files) // 2)
        self.files = files[: len(files) - kept] if split == "train" else files[len(files) - kept :]
        names = sorted({path.relative_to(root).parts[0] for path in files if len(path.relative_to(root).parts) > 1})
        if names and all(len(path.relative_to(root).parts) > 1 for path in files):
            self.classes = tuple(names)
            self.labels = torch.tensor([names.index(path.relative_to(root).parts[0]) for path in self.files])
        self.root = root

    def __len__(self) -> int:
        return len(self.files)

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """Threads of this process: a forked one inherits the object and none of its threads, and would wait for them forever."""
        owner, pool = self.__dict__.get("_threads", (None, None))
        if pool is None or owner != os.getpid():
            pool = ThreadPoolExecutor(self.options.workers)
            self._threads = os.getpid(), pool
        return pool

    def __getstate__(self) -> dict[str, Any]:
        """Without the threads: data workers start their own."""
        return {key: value for key, value in self.__dict__.items() if key != "_threads"}

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode())
        return f"{super().identity()} {digest.hexdigest()}"

    def _read(self, index: int) -> np.ndarray:
        image = load_image(self.files[index], where=str(self.files[index]))
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack(list(self._pool.map(self._read, indices)))).permute(0, 3, 1, 2)

    def contents(self, indices: Sequence[int]) -> list[str]:
        """Of the files' bytes: nothing is decoded."""
        return list(self._pool.map(self._content, indices))

    def describe(self, index: int) -> str:
        return f"image {index} ({self.files[index]})"

    def _content(self, index: int) -> str:
        try:
            return hashlib.sha256(self.files[index].read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise DataError(f"{self.files[index]}: cannot be read ({error.strerror})") from None


CHARTS = ("bar", "line", "pie", "scatter")


def draw_chart(kind: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """A simple chart ``(size, size, 3)`` uint8 with random values and colours, drawn at 4 × the size and reduced."""
    big = 4 * size
    image = Image.new("RGB", (big, big), tuple(int(v) for v in generator.integers(235, 256, 3)))
    draw = ImageDraw.Draw(image)
    margin, values = big // 8, generator.uniform(0.15, 1.0, int(generator.integers(3, 7)))
    colours = [tuple(int(v) for v in generator.integers(20, 200, 3)) for _ in values]
    span = big - 2 * margin
    if kind == "pie":
        start = float(generator.uniform(0, 360))
        for value, colour in zip(values / values.sum() * 360, colours):
            draw.pieslice((margin, margin, big - margin, big - margin), start, start + value, fill=colour)
            start += value
    else:
        axis, width = (40, 40, 40), max(1, big // 64)
        draw.line((margin, margin, margin, big - margin), fill=axis, width=width)
        draw.line((margin, big - margin, big - margin, big - margin), fill=axis, width=width)
        places = margin + (np.arange(len(values)) + 0.5) / len(values) * span
        tops = big - margin - values * span
        if kind == "bar":
            half = span / len(values) * 0.35
            for x, top, colour in zip(places, tops, colours):
                draw.rectangle((x - half, top, x + half, big - margin), fill=colour)
        elif kind == "line":
            draw.line([(float(x), float(y)) for x, y in zip(places, tops)], fill=colours[0], width=3 * width)
        else:
            for x, y, colour in zip(
                generator.uniform(margin, big - margin, 12), generator.uniform(margin, big - margin, 12), colours * 4
            ):
                draw.ellipse((x - 3 * width, y - 3 * width, x + 3 * width, y + 3 * width), fill=colour)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


class DigitsAndChartsOptions(StrictModel):
    digits: bool = True
    """scikit-learn's 1797 hand-written digits, enlarged (bicubic); every fifth is held out."""
    charts: int = Field(default=400, ge=0)
    """Rendered training charts of four kinds; a quarter as many are held out."""
    colour: bool = False
    """Draw each digit in a random colour on a random dark ground."""


class DigitsAndCharts(ImageSource):
    """Small real and rendered images with 14 classes (ten digits, four chart kinds); needs scikit-learn."""

    Options = DigitsAndChartsOptions
    classes = (*"0123456789", *CHARTS)

    def __init__(self, options: Any, size: int, split: Split):
        super().__init__(options, size, split)
        images, labels = [], []
        train = split == "train"
        if options.digits:
            digits, targets = self._digits()
            chosen = (np.arange(len(targets)) % 5 == 4) != train
            images += [self._enlarge(digit, index) for index, digit in enumerate(digits) if chosen[index]]
            labels += targets[chosen].tolist()
        number = options.charts if train else options.charts // 4
        generator = np.random.default_rng(1 if train else 2)
        for index in range(number):
            kind = index % len(CHARTS)
            images.append(draw_chart(CHARTS[kind], size, generator))
            labels.append(10 + kind)
        self._images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else torch.empty(0)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    @staticmethod
    def _digits() -> tuple[np.ndarray, np.ndarray]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UnavailableError(
                f"data.type digits_and_charts needs scikit-learn: {install_hint('train')}"
            ) from error
        data: Any = load_digits()
        return data.images, data.target

    def _enlarge(self, digit: np.ndarray, index: int) -> np.ndarray:
        small = Image.fromarray((digit / 16 * 255).astype(np.uint8))
        ink = (
            np.asarray(small.resize((self.size, self.size), Image.Resampling.BICUBIC), dtype=np.float32)[..., None]
            / 255
        )
        if not self.options.colour:
            return np.broadcast_to(ink * 255, (*ink.shape[:2], 3)).round().astype(np.uint8)
        generator = np.random.default_rng(1000 + index)
        ground, colour = generator.uniform(0, 80, 3), generator.uniform(150, 255, 3)
        return (ground * (1 - ink) + colour * ink).round().astype(np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._images[torch.as_tensor(indices, dtype=torch.int64)]
