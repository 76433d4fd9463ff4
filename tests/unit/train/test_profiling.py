"""Is a step's time divided by what was done in it?"""

from __future__ import annotations

from types import SimpleNamespace

from mllm.train.observe.trace import of_kernels, of_operations


def test_a_trace_is_divided_by_kernels_and_what_lies_between_them():
    def one(name, start, length, cat="kernel"):
        return {"name": name, "ts": start, "dur": length, "cat": cat}

    events = [one("nvjet_gemm", 0, 4000), one("flash_bwd", 5000, 2000), one("update_kernel", 6000, 3000)]  # two at once
    events += [
        one("Memcpy HtoD", 6500, 500, "gpu_memcpy"),
        one("nvjet_gemm", 11000, 1000),
        one("aten::mm", 0, 99, "cpu_op"),
        one("ncclDevKernel_AllReduce", 12000, 200),
    ]
    found = of_kernels(events, steps=2)
    assert found is not None
    shares = {"attention": 1.0, "matrix products": 2.5, "update": 1.5, "compiled elementwise": 0.0, "copies": 0.25}
    assert found.kinds == {**shares, "other": 0.0, "network": 0.1}
    assert found.whole == 6.1 and found.idle == 1.5 and found.gaps[0] == (2.0, "update_kernel", "nvjet_gemm")
    line = found.line()
    assert line.startswith("matrix products 2.5 ms (41%), update 1.5 ms (25%)") and line.endswith(
        ", no kernel runs 1.5 ms (25%)"
    )
    assert of_kernels([one("aten::mm", 0, 99, "cpu_op")], steps=2) is None


def test_operations_of_a_cpu_are_divided_by_their_own_time():
    times = {"aten::mm": 4000, "aten::_foreach_mul_": 2000, "gloo:all_reduce": 1000, "aten::relu": 1000}
    found = of_operations([SimpleNamespace(key=k, self_cpu_time_total=v) for k, v in times.items()], steps=2)
    assert found.line() == "matrix products 2.0 ms (50%), update 1.0 ms (25%), network 0.5 ms (12%), other 0.5 ms (12%)"
