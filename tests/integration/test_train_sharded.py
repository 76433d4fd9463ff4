"""Do checkpoints of `engine: sharded` go on under every engine and number of processes, and theirs under it?"""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm.train.engine.sharded import ShardedEngine
from mllm.train.launch import launch
from tests.integration.test_train_fsdp2 import CASES, TOLERANCE, _apart, _of, _run


def _run_cut(folder: str, kind: str, from_: str | None) -> None:
    ShardedEngine.alone_elements = 300
    _run(folder, kind, from_, "sharded")


def _run_zero(folder: str, kind: str, from_: str | None, engine: str) -> None:
    """DeepSpeed takes neither averages nor state in fewer bits."""
    for case in set(CASES) - {"adapter"}:
        del CASES[case]
    ShardedEngine.alone_elements = 300
    _run(folder, kind, from_, engine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    for case in CASES:
        (path / case).mkdir()
    _run(str(path), "one", None, "none")
    launch(_run_cut, 3, str(path), "three", None)
    launch(_run_cut, 2, str(path), "one, then two", "one")
    launch(_run_cut, 2, str(path), "three, then two", "three")
    launch(_run, 2, str(path), "three, then fsdp2", "three", "fsdp2")
    _run(str(path), "three, then one", "three", "none")
    launch(_run_zero, 2, str(path), "zero1", None, "zero1")
    launch(_run_zero, 2, str(path), "zero1, then two", "zero1", "sharded")
    launch(_run_zero, 2, str(path), "three, then zero1", "three", "zero1")
    return path


WAYS = ("three", "one, then two", "three, then two", "three, then one", "three, then fsdp2")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("case", "way"),
    [
        *((case, way) for case in CASES for way in WAYS),
        ("adapter", "zero1, then two"),
        ("adapter", "three, then zero1"),
    ],
)
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_processes(folder, case, way):
    """Weights, moments, averages and counts of updates: each would show in the two steps that follow."""
    wanted, found = _of(folder, case, "one"), _of(folder, case, way)
    assert set(wanted["state"]) == set(found["state"])
    assert _apart(case, wanted, found) < TOLERANCE.get(case, 2e-7)
    number = len(found["norms"])
    assert number == (4 if way == "three" else 2)
    close = 1e-5 if case != "half" else 1e-3
    assert found["norms"] == pytest.approx(wanted["norms"][-number:], rel=close)
    if "then zero1" not in way:  # which tells no norms of parts
        assert found["parts"] == pytest.approx(wanted["parts"], rel=close)
