"""Do folders of images read in data workers too, whatever their process had read before?"""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm.visual_tokenizers.images import FolderImages
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
