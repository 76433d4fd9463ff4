"""Do encoders that run on a stream of their own give the same numbers, and does each stream wait for what it needs?"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mllm.data.collate import Batch
from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train import run_recipe
from mllm.train.encoder_stream import EncoderStream
from mllm.train.engine.groups import apply_learning
from mllm.types import VisionFeatures
from tests.helpers import tiny_model
from tests.integration.train_helpers import make_recipe, metrics

CPU = torch.device("cpu")


def _stage(**changes) -> StageSpec:
    settings = {
        "name": "sft",
        "learn": {"connector": 1e-3},
        "data": "x.json",
        "steps": 1,
        "encoders_beside_update": True,
    }
    return StageSpec.model_validate({**settings, **changes})


def test_training_is_equal_to_the_bit_and_the_encoders_ran_there(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(EncoderStream, "__init__", _counted(EncoderStream.__init__, made))
    stage = {"name": "sft", "steps": 3, "gradient_accumulation": 2}
    run_recipe(make_recipe(tmp_path, stages=[stage]), output=tmp_path / "plain")
    run_recipe(make_recipe(tmp_path, stages=[{**stage, "encoders_beside_update": True}]), output=tmp_path / "beside")
    assert metrics(tmp_path / "beside") == metrics(tmp_path / "plain")
    (stream,) = made
    assert 3 <= stream.runs <= 6 and "encode_base" not in vars(stream.bank), "a batch may have no picture"


def _counted(begin, made):
    def initialise(self, *arguments):
        begin(self, *arguments)
        made.append(self)

    return initialise


def test_each_stream_waits_for_what_it_needs(tmp_path):
    model = tiny_model(tmp_path)[0]
    apply_learning(model, _stage())
    bank, waits = model.model.vision_tower, []
    stream = EncoderStream(model, _stage(), CPU)

    def one(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: waits.append((name, other.name)))

    main, side = one("main"), one("side")
    stream._stream, stream._present, stream._within = side, lambda: main, nullcontext
    stream._encode = lambda pixels, layouts=None: {"a": VisionFeatures(next(iter(pixels.values())), (1, 1))}
    undo = stream.attach(engine := SimpleNamespace(to_device=None))
    pixels = {name: torch.zeros(1, 3, 4, 4) for name in bank.encoders}
    batch = stream_batch(pixels)
    moved = engine.to_device(batch)
    assert waits == [("side", "main"), ("main", "side")], "weights first, then what was copied"
    given = {name: moved.inputs[name] for name in pixels}
    bank.encode_base(given)
    assert waits[2:] == [("main", "side")], "the encoders wait for nothing of the update"
    bank.encode_base({name: tensor + 1 for name, tensor in given.items()})
    assert waits[3:] == [("side", "main"), ("main", "side")], "pixels that were changed elsewhere are waited for"
    engine.to_device(batch)
    assert waits[5:] == [("main", "side")]
    undo()
    assert "encode_base" not in vars(bank)


def stream_batch(pixels) -> Batch:
    import dataclasses

    values = {field.name: None for field in dataclasses.fields(Batch)}
    return Batch(**{**values, "inputs": dict(pixels)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": {"connector": 1e-3, "encoders": 1e-4}}, "learns, so it cannot run before the update"),
        ({"engine": "zero3"}, "use none, zero1 or zero2"),
    ],
)
def test_what_cannot_run_before_the_update_is_refused(tmp_path, changes, message):
    model = tiny_model(tmp_path)[0]
    stage = _stage(**changes)
    apply_learning(model, stage)
    with pytest.raises(ConfigError, match=f"encoders_beside_update: .*{message}"):
        EncoderStream(model, stage, CPU)


def test_a_trace_is_divided_by_kernels_and_what_lies_between_them():
    from benchmarks.train_beside import of_trace

    def one(name, start, length, cat="kernel"):
        return {"name": name, "ts": start, "dur": length, "cat": cat}

    events = [one("nvjet_gemm", 0, 4000), one("flash_bwd", 5000, 2000), one("update_kernel", 6000, 3000)]  # two at once
    events += [
        one("Memcpy HtoD", 6500, 500, "gpu_memcpy"),
        one("nvjet_gemm", 11000, 1000),
        one("aten::mm", 0, 99, "cpu_op"),
    ]
    found = of_trace(events, steps=2)
    shares = {
        "attention": 1.0,
        "matrix products": 2.5,
        "update": 1.5,
        "compiled elementwise": 0.0,
        "copies": 0.25,
        "other": 0.0,
    }
    assert found["ms a step"] == shares
    assert found["between first and last"] == 6.0 and found["no kernel runs"] == 1.5
    assert found["longest gaps (ms, before, after)"][0] == (2.0, "update_kernel", "nvjet_gemm")
