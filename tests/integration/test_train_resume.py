"""Is a killed run's continuation equal, bit for bit, to the run that was never killed?"""

from __future__ import annotations

import _thread
import json
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from mllm.cli.main import main
from mllm.errors import CheckpointError, ConfigError
from mllm.train import run_recipe
from mllm.train.launch import WorkerFailed
from mllm.train.preflight.verify import verify_resume
from tests.integration.kill_points import aim, plugin, run, spare
from tests.integration.train_helpers import logged_steps, make_recipe, metrics, write_data

MIXED = {"learn": {"language_model": 1e-3, "connector": 3e-3, "encoders": 1e-4}, "optimizer": {"weight_decay": 0.1}}
MOMENTS: dict[str, dict] = {
    # Saving: tensors half written, written but not indexed, the manifest half written, everything but the new name.
    r"open .*first/\.writing-step-00000001/state-": {"half": True},
    r"open .*first/\.writing-step-00000002/index-": {},
    r"open .*first/\.writing-step-00000003/manifest": {"after": 1, "half": True},
    r"os.rename .*first/\.writing-step-00000005": {},
    # Pruning the oldest checkpoint; in the second epoch.
    r"shutil.rmtree .*first/\.deleting-step-": {"after": 2},
    # The stage's last folder: its model is there and the rest is not, everything but the new name.
    r"open .*\.writing-first/recipe.yaml": {},
    r"os.rename .*\.writing-first": {},
    # Between the stages: nothing yet of the second, checkpoints of the first half removed; the record being replaced.
    r"shutil.rmtree .*checkpoints/first$": {},
    r"shutil.rmtree .*checkpoints/first\b": {"after": 3},
    r"os.rename .*/metrics\.tmp": {},
    r"os.rename .*/run\.tmp": {"after": 2},
    r"open .*second/\.writing-step-00000002/random-": {},
    r"os.link .*\.writing-final": {"after": 1},
}


@pytest.mark.slow
def test_a_run_killed_at_every_step_of_saving_exporting_and_changing_stages_goes_on_bit_equal(tmp_path):
    """One run, killed again and again: a weighted mixture with workers and accumulation in fp32 over two epochs, then packing in bf16
    with checkpoints written in the background. Numbers, samples and the final weights must be those of the run that was left
    alone."""
    common = {"data": _mixture(tmp_path), "gradient_accumulation": 2, "save_every": 1, **MIXED}
    stages = [
        {"name": "first", "epochs": 2, "num_workers": 1, **common},
        {"name": "second", "epochs": 3, "packing": True, "dtype": "bfloat16", "save_in_background": True, **common},
    ]
    recipe = make_recipe(tmp_path, stages=stages)
    recipe.plugins = [plugin(tmp_path)]
    assert run(recipe, tmp_path / "whole", resume=False) == 0
    wanted = metrics(tmp_path / "whole")
    assert [r["stage"] for r in wanted].count("first") == 8 and wanted[-1]["samples"] == 48
    output = tmp_path / "killed"
    for number, (pattern, more) in enumerate(MOMENTS.items()):
        aim(tmp_path, output, pattern, **more)
        assert run(recipe, output, resume=number > 0) == -signal.SIGKILL, pattern
        assert not (output / "final").exists(), pattern
    spare(tmp_path)
    assert run(recipe, output, resume=True) == 0
    assert metrics(output) == wanted
    assert not list(output.rglob(".*")) and not list((output / "checkpoints").iterdir())
    assert len(json.loads((output / "run.json").read_text())["starts"]) == 1 + len(MOMENTS)
    for name in ("model.safetensors", "config.json"):
        assert (output / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (600, "run: the disk is full"),
        (200_000, r"sft: the trained stage could not be written.*last checkpoint is intact \(step-0"),
    ],
)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch, room, message):
    """No file may grow beyond ``room`` bytes: first the records do not fit, then the weights."""
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 3, "learn": {"connector": 1e-3}}], rows=6)
    monkeypatch.setattr(
        "mllm.train.observe.run_info.git_state", lambda **_: {}
    )  # a developer's difference may be large
    output, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    run_recipe(recipe, output=output, stop_after=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=message):
            run_recipe(recipe, output=output, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (output / "sft").exists() and [p.name for p in (output / "checkpoints" / "sft").iterdir()] == [
        "step-00000001"
    ]
    assert run_recipe(recipe, output=output, resume=True).is_dir()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_recipe_can_be_checked_for_exact_resume(tmp_path):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "epochs": 5, "dtype": "bfloat16", **MIXED}])
    report = verify_resume(recipe, steps=4, folder=tmp_path / "verify")
    assert report.equal and report.compared == 4, report.differences
    assert recipe.stages[0].epochs == 5


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_killed_in_every_stage_go_on_bit_equal_under_zero(tmp_path):
    """ZeRO-2 and ZeRO-3, fp32 and bf16; each stage is killed once, in one process or the other, while it saves or after
    a step that no checkpoint holds."""
    common = {"data": _mixture(tmp_path), "steps": 4, "batch_size": 1, "gradient_accumulation": 2, "save_every": 2}
    stages = [
        {"name": "two", "engine": "zero2", **common, **MIXED},
        {"name": "two_half", "engine": "zero2", **common, **MIXED, "dtype": "bfloat16", "packing": True},
        {"name": "three", "engine": "zero3", **common, **MIXED, "packing": True, "num_workers": 1},
        {"name": "three_half", "engine": "zero3", **common, **MIXED, "dtype": "bfloat16"},
    ]
    recipe = make_recipe(tmp_path, stages=stages)
    recipe.plugins = [plugin(tmp_path)]
    run_recipe(recipe, output=tmp_path / "whole", processes=2)
    output = tmp_path / "killed"
    moments: list[tuple[str, dict]] = [
        (r"open .*two/\.writing-step-00000002/state-00001", {"process": 1, "half": True}),
        (r"os.rename .*two_half/\.writing-step-00000002", {}),
        (r"os.rename .*three/\.writing-step-00000002", {"after": 1}),
        (r"open .*\.writing-three_half/recipe.yaml", {}),
    ]
    for number, (pattern, more) in enumerate(moments):
        aim(tmp_path, output, pattern, **more)
        with pytest.raises(WorkerFailed, match="SIGKILL"):
            run_recipe(recipe, output=output, processes=2, resume=number > 0)
    spare(tmp_path)
    run_recipe(recipe, output=output, processes=2, resume=True)
    assert metrics(output) == metrics(tmp_path / "whole") and len(metrics(output)) == 16
    history = json.loads((output / "run.json").read_text())
    assert len(history["starts"]) == 5 and set(history["stages"]) == {s["name"] for s in stages}
    for name in ("model.safetensors", "config.json"):
        assert (output / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()


def _mixture(folder: Path) -> dict:
    """Two datasets, one drawn three times as often."""
    paths = [
        write_data(folder / "data", rows=16),
        write_data(folder / "data", rows=10, name="other", text_only_every=2),
    ]
    weights = zip(paths, (3, 1))
    return {
        "datasets": [{"dataset": {"format": "llava", "path": str(p)}, "weight": w} for p, w in weights],
        "epoch_size": 16,
    }


def test_a_finished_run_says_what_differs_and_is_extended_from_its_optimizers_state(tmp_path):
    def recipe(**changes):
        stage = {"name": "sft", "steps": 2, "schedule": {"type": "constant", "warmup": 0}, "keep_state": True}
        return make_recipe(tmp_path, stages=[{**stage, **changes}], rows=6)

    output = tmp_path / "run"
    run_recipe(recipe(), output=output)
    with pytest.raises(
        CheckpointError, match=r"sft: the stage is finished, with other settings \(batch_size: 2 then, 3 now"
    ):
        run_recipe(recipe(batch_size=3), output=output, resume=True)
    with pytest.raises(CheckpointError, match=r"steps: 2 then, 4 now.*more steps of a last stage: --extend"):
        run_recipe(recipe(steps=4), output=output, resume=True)
    with pytest.raises(
        ConfigError, match=r"sft has done its 2 steps and is to have 2; give more, as stages.sft.steps=4"
    ):
        run_recipe(recipe(), output=output, extend=True)
    run_recipe(recipe(steps=4, keep_state=False), output=output, extend=True)
    run_recipe(recipe(steps=4), output=tmp_path / "whole")
    assert metrics(output) == metrics(tmp_path / "whole") and len(metrics(output)) == 4
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (output, tmp_path / "whole")]
    assert weights[0] == weights[1]
    with pytest.raises(CheckpointError, match=r"optimizer's state was not kept.*stages.sft.keep_state=true"):
        run_recipe(recipe(steps=6), output=output, extend=True)


def test_ctrl_c_ends_a_run_in_two_lines_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    steps, output = 40, tmp_path / "run"
    file = tmp_path / "tiny.yaml"
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": steps, "save_every": 4}])
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    command = ["mllm", "train", str(file), "--no-evaluate", "--output", str(output)]

    def press() -> None:
        while logged_steps(output) < 5:
            time.sleep(0.002)
        _thread.interrupt_main()

    watcher = threading.Thread(target=press, daemon=True)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a suite in the background is started without one
    watcher.start()
    monkeypatch.setattr(sys, "argv", command)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        watcher.join()
        signal.signal(signal.SIGINT, before)
    told = capsys.readouterr().err
    assert ended.value.code == 130 and "--resume goes on from the last checkpoint" in told and "Traceback" not in told
    assert 5 <= logged_steps(output) < steps and not (output / "final").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and (output / "final" / "config.json").is_file()
    assert [record["step"] for record in metrics(output)] == list(range(1, steps + 1))
