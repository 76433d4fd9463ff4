"""Does the clock count the images and the time of each part, and of no other?"""

from __future__ import annotations

import torch
from torch import nn

from mllm.serve.http.stats import EncoderClock, VisualStatistics
from mllm.types import VisionFeatures


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
