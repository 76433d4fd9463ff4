"""Does the check of the network measure, and say what is expected?"""

from __future__ import annotations

from mllm.train.preflight.network import check_network, fastest_link, verdict

FOUND = {
    "processes": 16, "machines": ["a", "b"], "device": "cuda", "latency": 2e-5, "bus": 20e9, "links": [(0, 1, 12e9)],
    "named": ("mlx5_0", 400.0),
}  # fmt: skip


def test_two_processes_are_measured(tmp_path):
    found = check_network(1.0, processes=2, machines=None, report=tmp_path / "report.json")
    assert found is not None and found["processes"] == 2 and found["bus"] > 1e6 and 0 < found["latency"] < 5
    lines = verdict(found)
    assert lines[1].startswith("all-reduce: ") and lines[-1].startswith("expected on one machine")


def test_a_slow_link_is_named_with_where_to_look():
    lines = verdict(FOUND)
    assert "expected: 45.0 GB/s between machines over mlx5_0 (400 Gb/s)" in lines[-2]
    assert lines[-1].startswith("slower than expected: 0 → 1. NCCL_DEBUG=INFO")
    assert "slower" not in "".join(verdict(FOUND | {"links": [(0, 1, 44e9)]}))
    assert "names no link's rate" in verdict(FOUND | {"named": ("", 0.0)})[-1]


def test_the_fastest_port_that_is_up_is_found(tmp_path):
    for name, speed, state in (("eth0", "100000", "up"), ("eth1", "400000", "down"), ("lo", "-1", "up")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed)
        (tmp_path / "net" / name / "operstate").write_text(state)
    assert fastest_link(tmp_path) == ("eth0", 100.0)
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "state").write_text("4: ACTIVE\n")
    assert fastest_link(tmp_path) == ("mlx5_0", 400.0)
    assert fastest_link(tmp_path / "nothing") == ("", 0.0)
