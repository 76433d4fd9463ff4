"""Do several processes answer every question exactly once, whatever is killed on the way?"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.generators.vllm import own_gpu
from mllm.eval.launch import start_workers
from mllm.eval.predictions import prediction_path, read_predictions
from mllm.eval.run import evaluate, run_eval
from mllm.eval.settings import EvalSettings
from mllm.eval.share import Share
from tests.helpers import free_port, tiny_model
from tests.unit.eval.rules import RuleGenerator, pixel_rule
from tests.unit.eval.test_runner import TASK, make_data, run

ROOT = Path(__file__).parents[3]


def slow_share(folder: Path, output: Path, rank: int, world: int) -> None:
    def rule(request):
        time.sleep(0.003)
        return pixel_rule(request)

    run(folder, output, rule, rank=rank, world=world)


def start(folder: Path, output: Path, world: int) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_share, args=(folder, output, rank, world)) for rank in range(world)]
    for worker in workers:
        worker.start()
    return workers  # type: ignore[return-value]


def answered(output: Path) -> int:
    """Different questions with an answer in any file."""
    return len({row["id"] for path in output.glob("demo_charts*.jsonl") for row in read_predictions(path)})


def test_three_processes_killed_at_random_points_and_started_again_answer_everything_once(tmp_path):
    folder = make_data(tmp_path / "d", 480)
    run(folder, tmp_path / "whole")
    whole = (tmp_path / "whole/demo_charts.jsonl").read_text()
    draw, output = random.Random(7), tmp_path / "o"
    counts = []
    for world in (3, 3, 2, 3):  # the number of processes changes on the way, too
        workers = start(folder, output, world)
        until = time.monotonic() + 60
        while time.monotonic() < until and answered(output) <= (counts[-1] if counts else 0):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.03))
        victims = draw.sample(workers, draw.randint(1, world))
        for worker in victims:
            worker.kill()
        for worker in workers:
            if worker not in victims:
                worker.terminate()
            worker.join()
        counts.append(answered(output))
    assert counts == sorted(counts) and 0 < counts[-1] < 480, "killed on the way, and nothing that stood was lost"
    workers = start(folder, output, 3)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert (output / "demo_charts.jsonl").read_text() == whole
    assert not (output / ".queue").exists()


def test_what_one_number_of_processes_answered_is_not_asked_again_by_another(tmp_path):
    folder = make_data(tmp_path / "d", 36)
    run(folder, tmp_path / "whole")
    claims = tmp_path / "o/.queue"
    claims.mkdir(parents=True)
    for cell in (0, 2):
        (claims / f"demo_charts.{cell:07d}.cell").symlink_to("0")  # as if process 0 were at them
    _, generator = run(folder, tmp_path / "o", rank=1, world=3)
    assert generator.asked == [f"q{k}" for k in (*range(8, 16), *range(24, 36))], "cells of eight that nobody took"
    _, generator = run(folder, tmp_path / "o")
    assert generator.asked == [f"q{k}" for k in (*range(8), *range(16, 24))]
    assert sorted((tmp_path / "o/demo_charts.jsonl").read_text()) == sorted(
        (tmp_path / "whole/demo_charts.jsonl").read_text()
    )
    _, generator = run(folder, tmp_path / "o", rank=1, world=2)
    assert generator.asked == [], "a single run's answers serve a shared one"
    _, generator = run(folder, tmp_path / "o", name="another model", rank=1, world=5)
    assert len(generator.asked) == 20, "another model's answers do not; process 0 holds sixteen of the 36"
    _, generator = run(folder, tmp_path / "o", rank=1, world=5, resume=False)
    assert len(generator.asked) == 20, "and starting over asks again"


def test_nobody_waits_for_the_longest_task_nor_for_a_slow_process(tmp_path):
    """Two tasks, one of them long, and a process that takes ten times as long per answer: it gives a part of the answers, and the
    other goes on to the next task meanwhile."""
    data = {name: make_data(tmp_path / name, count) for name, count in (("demo_charts", 200), ("demo_digits", 24))}
    output, context = tmp_path / "o", multiprocessing.get_context("fork")

    def work(rank: int) -> None:
        def rule(request):
            time.sleep(0.02 if rank else 0.002)
            return pixel_rule(request)

        results = evaluate(RuleGenerator(rule), list(data), output, data=data, progress=False, rank=rank, world=2)
        assert rank or [result.num_samples for result in results.values()] == [200, 24]

    workers = [context.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    shares = [len(read_predictions(prediction_path(output, TASK, None, rank, 2))) for rank in (0, 1)]
    assert sum(shares) == 200 and shares[0] > 2 * shares[1] > 0, "by halves, as it was, the slow one took 100"
    header = json.loads((output / "demo_charts.run.json").read_text())
    assert header["answered"] == 200 and header["seconds"] >= 0.002 * shares[0] + 0.02 * shares[1]
    assert not (output / ".queue").exists()


def test_each_process_gives_its_vllm_a_gpu_of_its_own():
    assert own_gpu({"LOCAL_RANK": "2"}, 4) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert own_gpu({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5,GPU-ab"}, 3) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert own_gpu({"LOCAL_RANK": "5"}, 4) == {"CUDA_VISIBLE_DEVICES": "1"}, "more processes than GPUs share them"
    assert own_gpu({}, 4) == own_gpu({"LOCAL_RANK": "1"}, 1) == own_gpu({"LOCAL_RANK": "0"}, 0) == {}


def test_marks_and_cells_of_an_earlier_run_are_not_waited_on(tmp_path):
    old = Share(tmp_path, 1, 3)
    assert [k for part in old.take("a task (gray)", 20) for k in part] == list(range(20))
    old.leave(["an earlier run"])
    now = Share(tmp_path, 0, 2)
    assert list(now.take("a task (gray)", 20)) == [], "process 1 has not started anew"
    now.leave(["this run"])
    with pytest.raises(DataError, match=r"no result from process 1 of 2"):
        now.wait(["this run"], patience=0.0)
    again = Share(tmp_path, 1, 2)
    assert [k for part in again.take("a task (gray)", 20) for k in part] == list(range(20)), "it gave back what it had"
    again.spent["a task (gray)"] = 2.5, 20
    again.leave(["this run"])
    assert now.wait(["this run"]) == {"a task (gray)": (2.5, 20)}
    assert [len(part) for part in Share(tmp_path, 0, 2).take("long", 400)] == [
        96,
        72,
        56,
        40,
        32,
        24,
        16,
        16,
        8,
        8,
        8,
        8,
        8,
        8,
    ], "many at the beginning, few at the end"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model, processor = tiny_model(folder / "tokenizer")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    return folder / "final"


@pytest.mark.slow
def test_run_eval_shares_the_questions_among_processes(checkpoint, tmp_path, capfd):
    folder = make_data(tmp_path / "d", 9)
    common = {"data_dirs": {TASK: folder}, "device": "cpu", "overrides": [f"{TASK}.generation.max_new_tokens=4"]}
    alone = run_eval(str(checkpoint), [TASK], EvalSettings(output_dir=tmp_path / "one", progress=False, **common))[TASK]
    shared = run_eval(
        str(checkpoint), [TASK], EvalSettings(output_dir=tmp_path / "two", processes=2, blind="none", **common)
    )[TASK]
    assert (tmp_path / "two/demo_charts.jsonl").read_text() == (tmp_path / "one/demo_charts.jsonl").read_text()
    assert shared.metrics == alone.metrics and shared.blind is not None and shared.blind.num_samples == 9
    assert "demo_charts" in capfd.readouterr().out and (tmp_path / "two/report.html").exists()
    sizes = [len(read_predictions(prediction_path(tmp_path / "two", TASK, None, rank, 2))) for rank in (0, 1)]
    assert sum(sizes) == 9


def test_a_process_that_fails_is_named_and_stops_the_others(tmp_path, capfd):
    started = time.monotonic()
    arguments = (str(tmp_path / "nowhere"), ["demo_chart"], EvalSettings())
    with pytest.raises(UnavailableError, match=r"process \d of 2 ended with code 1"):
        start_workers(2, *arguments)
    assert "unknown task 'demo_chart'" in capfd.readouterr().err and time.monotonic() - started < 60
    with pytest.raises(ConfigError, match="at least 2"):
        start_workers(1, *arguments)


ORPHAN = """
import os, sys, time
from mllm.eval import launch
launch.follow(int(sys.argv[1]))
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {orphan!r}, str(os.getpid())])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_workers_end_when_the_process_that_started_them_is_killed():
    command = [sys.executable, "-c", PARENT.format(orphan=ORPHAN)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(parent.stdout.readline())
    time.sleep(1.0)
    assert _alive(child), "it must end by its parent's end, not by itself"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and _alive(child):
        time.sleep(0.1)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_only_process_0_joins_what_was_answered(tmp_path):
    folder = make_data(tmp_path / "d", 6)
    evaluate(RuleGenerator(pixel_rule), [TASK], tmp_path / "o", data={TASK: folder}, progress=False, rank=1, world=2)
    lines = (tmp_path / "o/demo_charts.shard-0001-of-0002.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{k}" for k in range(6)]
    assert not (tmp_path / "o/demo_charts.jsonl").exists()


@pytest.mark.nightly
def test_two_machines_with_a_common_disk_share_the_questions(checkpoint, tmp_path):
    """Two launchers of two nodes, as ``torchrun --nnodes 2`` starts them, each with a process of its own: every question is answered
    once, both nodes answer some, and the answers are those of one process."""
    data = {name: make_data(tmp_path / name, count) for name, count in ((TASK, 60), ("demo_digits", 30))}
    port, words = str(free_port()), [word for name in data for word in ("--data", f"{name}={data[name]}")]
    told = ["--tasks", "demo", "--device", "cpu", *words, *(f"{name}.generation.max_new_tokens=2" for name in data)]

    def command(*launcher: str, output: Path) -> list[str]:
        return [*launcher, "-m", "mllm.cli.main", "eval", "run", str(checkpoint), "--output", str(output), *told]

    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
    ]
    nodes = [
        subprocess.Popen(command(*launch, "--master-port", port, "--node-rank", str(k), output=tmp_path / "two"), cwd=ROOT)
        for k in (0, 1)
    ]  # fmt: skip
    assert [node.wait(900) for node in nodes] == [0, 0]
    subprocess.run(command(sys.executable, output=tmp_path / "one"), cwd=ROOT, check=True)
    for name, count in ((TASK, 60), ("demo_digits", 30)):
        one, two = (
            {row["id"]: row["output"] for row in read_predictions(tmp_path / way / f"{name}.jsonl")}
            for way in ("one", "two")
        )
        assert one == two and len(two) == count
        parts = [len(read_predictions(prediction_path(tmp_path / "two", name, None, rank, 2))) for rank in (0, 1)]
        assert sum(parts) == count
    shares = [
        sum(len(read_predictions(prediction_path(tmp_path / "two", name, None, rank, 2))) for name in data)
        for rank in (0, 1)
    ]
    assert min(shares) > 0 and (tmp_path / "two/report.html").exists() and not (tmp_path / "two/.queue").exists()
