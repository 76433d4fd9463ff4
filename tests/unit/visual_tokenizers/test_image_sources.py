"""Are pictures of folders read as everywhere else, and in data workers too, whatever their process had read before?"""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import DataError
from mllm.processing.images import load_image
from mllm.visual_tokenizers.images import FolderImages
from mllm.visual_tokenizers.questions import _read
from tests.helpers import picture


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    for number in range(4):
        picture(number, size=(20, 16)).save(tmp_path / f"{number}.png")
    options = SimpleNamespace(path=str(tmp_path), held_out=1, workers=2)
    return FolderImages(options, 16, "train")


def test_a_forked_worker_reads_what_its_parent_has_read(images: FolderImages) -> None:
    """Threads of the parent do not live in the worker."""
    before = images.batch([0])
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        theirs.send(images.batch([0]).numpy())

    worker: Any = context.Process(target=work)
    worker.start()
    try:
        assert ours.poll(60), "it waits for threads that it has not"
        assert torch.equal(torch.from_numpy(ours.recv()), before)
    finally:
        worker.kill()
        worker.join()
    assert torch.equal(images.batch([0]), before)


def test_a_spawned_worker_gets_no_threads(images: FolderImages) -> None:
    before = images.batch([2])
    assert torch.equal(pickle.loads(pickle.dumps(images)).batch([2]), before)


def odd_pictures(folder: Path) -> list[Path]:
    """One that its EXIF block turns, one of 16 bits, one that is transparent in its left half."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, size=(20, 16)).save(folder / "turned.png", exif=turned)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(folder / "deep.png")
    clear = picture(2, size=(16, 16)).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 8, 16))
    clear.save(folder / "clear.png")
    return [folder / name for name in ("turned.png", "deep.png", "clear.png")]


def test_odd_pictures_are_read_as_models_read_them(tmp_path: Path) -> None:
    """They were taken lying on their side, white (16 bits) and black (transparent)."""
    files = odd_pictures(tmp_path)
    picture(3, size=(16, 16)).save(tmp_path / "held.png")
    for seed in range(4):  # half of them may be held out
        picture(4 + seed, size=(16, 16)).save(tmp_path / f"more-{seed}.png")
    source = FolderImages(SimpleNamespace(path=str(tmp_path), held_out=1, workers=2), 16, "train")
    source.files = files
    for number, file in enumerate(files):
        whole = load_image(file, where="x")
        if whole.size != (16, 16):
            whole = whole.resize((16, 20), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
        assert torch.equal(source.batch([number])[0].permute(1, 2, 0), torch.from_numpy(np.asarray(whole)).clone())
        assert np.array_equal(_read(file, 16), load_image(file, where="x").resize((16, 16), Image.Resampling.BICUBIC))
    assert source.batch([1]).float().std() > 50 and source.batch([2])[0, :, :, :8].min() == 255
    files[0].write_bytes(files[0].read_bytes()[:60])
    with pytest.raises(DataError, match=r"turned\.png"):
        source.batch([0])
