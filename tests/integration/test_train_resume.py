"""Is a killed run's continuation equal, bit for bit, to the run that was never killed?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm.train import run_recipe
from mllm.train.launch import WorkerFailed
from mllm.train.verify import verify_resume
from tests.integration.train_helpers import kill_when, kill_workers_when, logged_steps, make_recipe, metrics, start

MIXED = {"learn": {"language_model": 1e-3, "connector": 3e-3, "encoders": 1e-4}, "optimizer": {"weight_decay": 0.1}}


@pytest.mark.slow
def test_one_process_killed_while_saving_in_the_second_epoch_goes_on_bit_equal(tmp_path):
    stage = {
        "name": "sft",
        "epochs": 3,
        "gradient_accumulation": 2,
        "packing": True,
        "num_workers": 1,
        "save_every": 1,
        **MIXED,
    }
    recipe = make_recipe(tmp_path, stages=[stage], rows=20)
    run_recipe(recipe, output=tmp_path / "whole")
    wanted = metrics(tmp_path / "whole")
    assert len(wanted) >= 6 and wanted[-1]["samples"] > 40
    killed = tmp_path / "killed"
    process = start(recipe, tmp_path, killed)
    checkpoints = killed / "checkpoints" / "sft"
    kill_when(process, lambda: logged_steps(killed) >= 4 and list(checkpoints.glob(".writing-*")))
    assert not (killed / "final").exists()
    run_recipe(recipe, output=killed, resume=True)
    assert metrics(killed) == wanted
    assert not list(checkpoints.glob(".*"))
    for name in ("model.safetensors", "config.json"):
        assert (killed / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()


@pytest.mark.slow
def test_a_recipe_can_be_checked_for_exact_resume(tmp_path):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "epochs": 5, "precision": "bf16", **MIXED}])
    report = verify_resume(recipe, steps=4, folder=tmp_path / "verify")
    assert report.equal and report.compared == 4, report.differences
    assert recipe.stages[0].epochs == 5


@pytest.mark.slow
def test_two_processes_killed_in_every_stage_go_on_bit_equal_under_zero(tmp_path):
    """Each stage is killed after a step that no checkpoint holds; the resumed run must repeat what was logged
    exactly."""
    common = {"epochs": 1, "batch_size": 1, "gradient_accumulation": 2, "save_every": 2, **MIXED}
    stages = [
        {"name": "two", "engine": "zero2", **common},
        {"name": "three", "engine": "zero3", **common},
        {"name": "half", "engine": "zero3", **common, "precision": "bf16"},
    ]
    recipe = make_recipe(tmp_path, stages=stages, rows=22)
    output = tmp_path / "run"
    remembered: list[dict] = []
    for number, stage in enumerate(stages):
        with (
            kill_workers_when(lambda name=stage["name"]: _reached(output, name, 3)),
            pytest.raises(WorkerFailed, match="SIGKILL"),
        ):
            run_recipe(recipe, output=output, processes=2, resume=number > 0)
        shutil.rmtree(output / "checkpoints" / stage["name"] / "step-00000004", ignore_errors=True)
        remembered += [r for r in metrics(output) if r["stage"] == stage["name"]]
        assert remembered[-1]["step"] >= 3 and remembered[-1]["stage"] == stage["name"]
    run_recipe(recipe, output=output, processes=2, resume=True)
    found = {(r["stage"], r["step"]): r for r in metrics(output)}
    assert [k for k in found if k[0] == "half"] == [("half", step) for step in range(1, 7)]
    for record in remembered:
        assert found[record["stage"], record["step"]] == record
    history = json.loads((output / "run.json").read_text())
    assert len(history["starts"]) == 4 and set(history["stages"]) == {"two", "three", "half"}


def _reached(output: Path, stage: str, step: int) -> bool:
    try:
        return any(r["stage"] == stage and r["step"] >= step for r in metrics(output))
    except (FileNotFoundError, ValueError):
        return False
