"""Is a step's time divided by what was done in it?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm.train.observe.profiling import StepTimes, _Recorded, mark
from mllm.train.observe.trace import of_kernels, of_operations


def one(name, start, length, cat="kernel", tid=7, **args):
    return {"name": name, "ts": start, "dur": length, "cat": cat, "tid": tid, "args": args}


def test_a_trace_is_divided_by_kernels_and_what_lies_between_them():
    events = [one("nvjet_gemm", 0, 4000), one("flash_bwd", 5000, 2000), one("update_kernel", 6000, 3000)]  # two at once
    events += [
        one("Memcpy HtoD", 6500, 500, "gpu_memcpy"),
        one("ncclDevKernel_AllReduce", 8000, 1500),  # its last 500 alone
        one("nvjet_gemm", 11000, 1000),
        one("aten::mm", 0, 99, "cpu_op"),
        one("ncclDevKernel_AllReduce", 12000, 200),
    ]
    found = of_kernels(events, steps=2)
    assert found is not None
    shares = {"attention": 1.0, "matrix products": 2.5, "update": 1.0, "compiled elementwise": 0.0, "copies": 0.0}
    none = {"other": 0.0, "encoders": 0.0, "waiting for data": 0.0}
    assert found.kinds == {**shares, **none, "network": pytest.approx(0.35)}
    assert found.whole == 6.1 and found.idle == 1.25 and found.gaps[0] == (1.5, "ncclDevKernel_AllReduce", "nvjet_gemm")
    line = found.line()
    assert line.startswith("matrix products 2.5 ms (41%), ") and line.endswith(", no kernel runs 1.2 ms (20%)")
    assert sum(found.kinds.values()) + found.idle == pytest.approx(found.whole)
    assert of_kernels([one("aten::mm", 0, 99, "cpu_op")], steps=2) is None


def test_kernels_belong_to_the_range_that_they_were_started_in_and_to_its_backward_pass():
    events = [
        one("mllm.data", 0, 300, "user_annotation"),
        one("mllm.encoders", 1000, 500, "user_annotation"),
        one("aten::addmm", 1100, 50, "cpu_op", **{"Sequence number": 3, "Fwd thread id": 0}),
        one("aten::embedding", 1450, 20, "cpu_op", **{"Sequence number": 4, "Fwd thread id": 0}),
        one(
            "aten::add", 1600, 20, "cpu_op", **{"Sequence number": 4, "Fwd thread id": 0}
        ),  # made function 4: the decoder's
        one("autograd::engine::evaluate_function: A", 3000, 50, "cpu_op", 8, **{"Sequence number": 4}),
        one("autograd::engine::evaluate_function: B", 3100, 50, "cpu_op", 8, **{"Sequence number": 3}),
        one("mllm.update", 4000, 100, "user_annotation"),
    ]
    for number, (start, thread) in enumerate([(1200, 7), (1700, 7), (3010, 8), (3110, 8), (4010, 7)]):
        events.append(one("cudaLaunchKernel", start, 5, "cuda_runtime", thread, correlation=number))
        events.append(one("nvjet_gemm", 2000 + 1000 * number, 1000, correlation=number))
    found = of_kernels(events, steps=1, seconds=6e-3)
    assert found is not None
    kinds = {kind: value for kind, value in found.kinds.items() if value}
    assert kinds == {"encoders": 2.0, "matrix products": 2.0, "update": 1.0, "waiting for data": 0.3}
    assert found.whole == 6.0 and found.idle == pytest.approx(0.7)


def test_operations_of_a_cpu_are_divided_by_their_own_time():
    events = [
        one("aten::linear", 0, 4000, "cpu_op"),
        one("aten::softmax", 1000, 1000, "cpu_op"),
        one("aten::_foreach_mul_", 5000, 2000, "cpu_op"),
        one("gloo:all_reduce", 5000, 1000, "cpu_op", tid=8),
        one("aten::relu", 8000, 1000, "cpu_op"),
        one("mllm.data", 9000, 1000, "user_annotation"),
        one("aten::mm", 9100, 500, "cpu_op"),
    ]
    found = of_operations(events, steps=2)
    assert found.line() == (
        "matrix products 1.5 ms (33%), update 1.0 ms (22%), network 0.5 ms (11%), attention 0.5 ms (11%), "
        "waiting for data 0.5 ms (11%), other 0.5 ms (11%)"
    )
    assert of_operations(events, steps=2, seconds=12e-3).kinds["other"] == pytest.approx(2.0)


class _Model(nn.Module):
    def __init__(self, encoder_width: int):
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Linear(64, encoder_width), nn.ReLU(), nn.Linear(encoder_width, 64))
        self.decoder = nn.Linear(64, 64)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.vision_tower(pixels)).sum()


@pytest.mark.parametrize("learns", [True, False])
def test_a_real_profile_finds_the_encoders_forward_and_backward_pass(learns, tmp_path):
    model = _Model(2048)
    model.vision_tower.requires_grad_(learns)
    recorded = _Recorded(model)
    with mark("mllm.data"):
        pixels = torch.randn(256, 64)
    model(pixels).backward()
    recorded.stop()
    found = recorded.division(tmp_path / "trace.json", 1).kinds
    assert found["encoders"] > 4 * found["matrix products"] > 0 and found["waiting for data"] > 0
    assert not model.vision_tower._forward_hooks and not model.vision_tower._forward_pre_hooks


def test_the_profile_by_itself_is_left_out_of_short_runs():
    class Stage:
        name = "sft"

    for left, comes in ((49, False), (50, True)):
        times = StepTimes(Stage(), left, print, print)  # type: ignore[arg-type]
        assert bool(times.steps) is comes


@pytest.mark.parametrize("moment", ["start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_ends_no_training(moment, monkeypatch, caplog):
    class Stage:
        name, num_workers, compile = "sft", 0, False

    def fail(*_, **__):
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    told, model = [], _Model(8)
    times = StepTimes(Stage(), 50, told.append, told.append, model)  # type: ignore[arg-type]
    times.first = 1
    monkeypatch.setattr(torch.profiler.profile, moment, fail)
    for _ in range(6):
        times()
        model(torch.randn(2, 64)).backward()
        times.stepped()
    times.close()
    assert not told and caplog.text.count("CUPTI_ERROR_NOT_INITIALIZED") == 1
    assert not model.vision_tower._forward_hooks and not model.vision_tower._forward_pre_hooks
