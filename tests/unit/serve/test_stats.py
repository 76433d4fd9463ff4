"""Does the clock count the images and the time of each part, and of no other?"""

from __future__ import annotations

import asyncio

import torch
from torch import nn

from mllm.serve.http.stats import Choices, EncoderClock, VisualStatistics, picture_key, read_choices
from mllm.types import Routing, VisionFeatures


class Encoder(nn.Module):
    def forward(self, pixels: torch.Tensor) -> VisionFeatures:
        if pixels.shape[-1] != 4:
            raise ValueError("four columns")
        return VisionFeatures(tokens=pixels.flatten(2).mT, grid=(4, 4))


def test_each_part_counts_its_own_images_and_time():
    clock = EncoderClock()
    parts = {"semantic": Encoder(), "spatial": Encoder(), "connector": nn.Linear(3, 5)}
    for name, part in parts.items():
        clock.watch(name, part)
    parts["semantic"](torch.rand(3, 3, 4, 4))
    parts["semantic"](torch.rand(2, 3, 4, 4))
    parts["connector"](torch.rand(4, 16, 3))
    read = clock.read()
    assert {name: part["images"] for name, part in read.items()} == {"semantic": 5, "spatial": 0, "connector": 4}
    assert clock.seconds["semantic"] > 0 and clock.seconds["connector"] > 0 and read["spatial"]["seconds"] == 0


def test_a_pass_that_fails_counts_nothing_and_does_not_spoil_the_next():
    clock = EncoderClock()
    encoder = Encoder()
    clock.watch("semantic", encoder)
    for columns in (5, 4):
        try:
            encoder(torch.rand(2, 3, 4, columns))
        except ValueError:
            assert clock.read()["semantic"] == {"images": 0, "seconds": 0.0}
    assert clock.read()["semantic"]["images"] == 2


def test_a_worker_answers_with_its_models_clock_or_with_nothing():
    class Worker(VisualStatistics):
        def get_model(self):
            return self.model

    worker = Worker()
    worker.model = nn.Linear(2, 2)
    assert worker.visual_statistics() == {}
    worker.model.clock = EncoderClock()
    worker.model.clock.watch("semantic", Encoder())
    assert worker.visual_statistics() == {"semantic": {"images": 0, "seconds": 0.0}}


def test_who_looked_is_remembered_by_the_file_and_the_question():
    keys = [picture_key(b"one", "what?"), picture_key(b"one", "where?"), picture_key(b"two", "what?")]
    assert len(set(keys)) == 3 and picture_key(b"one", "what?") == keys[0]

    class Worker(VisualStatistics):
        def __init__(self):
            self.model = nn.Linear(2, 2)
            self.model.choices = Choices(size=2)

        def get_model(self):
            return self.model

    class Client:
        """vLLM's, with two workers of which one knows each picture."""

        def __init__(self):
            self.workers = [Worker(), Worker()]

        async def collective_rpc(self, method, *, timeout, args):
            return [getattr(worker, method)(*args) for worker in self.workers]

    client = Client()
    first, second = (worker.model.choices for worker in client.workers)
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    first.keep([keys[0], 0], Routing(("text", "charts"), weights))
    second.keep([keys[1]], Routing(("text", "charts"), torch.tensor([[0.0, 1.0]])))
    assert asyncio.run(read_choices(client, keys[:2])) == [["text", "charts"], ["charts"]]
    assert asyncio.run(read_choices(client, keys)) is None, "one is not known"
    first.keep(keys[1:], Routing(("text", "charts"), weights))
    assert first.of(keys) == {keys[1]: ["text", "charts"], keys[2]: []}, "the oldest is forgotten"
