"""Does a run that is told to stop end behind its step with a checkpoint, in all its processes, and go on bit-equal?"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from mllm.errors import Interrupted
from mllm.stopping import asked_to_stop
from mllm.train import run_recipe
from tests.integration.train_helpers import logged_steps, make_recipe, metrics

MIXED = {"learn": {"language_model": 1e-3, "connector": 3e-3}, "gradient_accumulation": 2}


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_stops_behind_the_step_and_resume_equals_the_run_that_was_left_alone(
    tmp_path, processes, number, capfd
):
    stages = [{"name": "sft", "steps": 12, "num_workers": 1, **MIXED}]
    recipe = make_recipe(tmp_path, stages=stages)
    whole, output = tmp_path / "whole", tmp_path / "told"
    if processes == 1:  # that resuming on several is exact, other tests hold
        run_recipe(recipe, output=whole)

    def tell() -> None:
        while logged_steps(output) < 3:
            time.sleep(0.002)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher passes on what the terminal has said as well

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=tell, daemon=True)
    watcher.start()
    try:
        with pytest.raises(Interrupted) as stopped:
            run_recipe(recipe, output=output, processes=processes)
    finally:
        watcher.join()
        signal.signal(signal.SIGINT, before)
    done = logged_steps(output)
    assert 3 <= done < 12 and f"saved up to step {done} " in str(stopped.value)
    assert capfd.readouterr().err.count("stopping behind this step") == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run_recipe(recipe, output=output, resume=True, processes=processes)
    assert [record["step"] for record in metrics(output)] == list(range(1, 13))
    if processes == 1:
        assert metrics(output) == metrics(whole)
        weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (output, whole)]
        assert weights[0] == weights[1]


def test_a_stop_in_the_last_step_of_a_stage_begins_no_other(tmp_path, monkeypatch):
    stages = [{"name": name, "steps": 2, **MIXED} for name in ("first", "second")]
    recipe = make_recipe(tmp_path, stages=stages)
    from mllm.train import trainer

    step = trainer.optimizer_step

    def told_in_the_second(*given, **named):
        told_in_the_second.calls += 1
        if told_in_the_second.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            named["stop"] = (
                True  # the handler runs before the next line of Python; this call's argument was made before
            )
        return step(*given, **named)

    told_in_the_second.calls = 0
    monkeypatch.setattr(trainer, "optimizer_step", told_in_the_second)
    with pytest.raises(Interrupted, match=r"stage first is finished .* goes on with the next"):
        run_recipe(recipe, output=tmp_path / "run")
    assert told_in_the_second.calls == 2
    assert run_recipe(recipe, output=tmp_path / "run", resume=True).is_dir()


def test_a_second_signal_does_what_it_did_before(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr("mllm.stopping.TOLD_ONCE", 0.0)
        with pytest.raises(KeyboardInterrupt), asked_to_stop(False) as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.by == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second did nothing")
        with asked_to_stop(False, patient=True) as asked:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
        assert asked.by == "SIGTERM"
    finally:
        signal.signal(signal.SIGINT, before)
