"""Does the number of workers follow from what reading and stepping took?"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from mllm.data import workers
from mllm.data.workers import WorkerChoice, at_first, cores_per_process, needed, timed


@pytest.mark.parametrize(
    ("reading", "step", "cores", "wanted"),
    [
        (0.001, 1.0, 16, 1),  # hardly anything to read: still not in the training process
        (0.5, 1.0, 16, 1),
        (1.0, 1.0, 16, 2),  # half as many again as just enough
        (3.0, 0.5, 16, 9),
        (30.0, 0.5, 16, 15),  # a core for the training process
        (3.0, 0.5, 1, 0),  # no core to spare: in the training process itself
    ],
)
def test_workers_are_half_as_many_again_as_needed_and_no_more_than_cores(reading, step, cores, wanted):
    assert needed(reading, step, cores) == wanted


def test_the_slowest_process_decides_after_the_steps_that_are_measured(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(workers, "cores_per_process", lambda: 8)
    monkeypatch.setattr(workers.distributed, "gather_objects", lambda own: [own, (2.0, 1.0)])  # another reads longer
    choice, found = WorkerChoice(), []
    assert choice.first == 4
    for step in range(8):
        choice.hand()
        clock.now += 30.0 if step < 2 else 1.0  # compiling
        found.append(choice.back([SimpleNamespace(seconds=0.25), SimpleNamespace(seconds=0.25)]))
    assert found[:7] == [None] * 7 and found[7] is not None
    number, line = found[7]
    assert number == 3 and "3 for each process" in line and "2,000 ms to read, the step 1,000 ms (8 cores" in line
    assert "as many as" not in line


def test_workers_of_shards_divide_the_lanes(monkeypatch):
    monkeypatch.setattr(workers, "cores_per_process", lambda: 4)
    choice = WorkerChoice(divides=4)
    assert [choice.allowed(n) for n in (0, 1, 2, 3, 9)] == [0, 1, 2, 2, 4]
    assert choice.first == 2


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert cores_per_process() == 12 and at_first(12) == 4 and at_first(2) == 1 and at_first(1) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 3


def test_batches_know_how_long_they_took(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: clock.now)

    def batches():
        for seconds in (2.0, 3.0):
            clock.now += seconds
            yield [SimpleNamespace(seconds=0.0)]

    assert [parts[0].seconds for parts in timed(batches())] == [2.0, 3.0]
