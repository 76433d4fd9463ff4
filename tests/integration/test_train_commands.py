"""Do `mllm plan`, `inspect`, `verify-resume` and `runs` say what is true of a recipe, to a user who types them?"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import ConfigError, UnknownName
from mllm.train import run_recipe
from mllm.train.observe.run_diff import diff_runs
from mllm.train.preflight.inspection import inspect_recipe
from mllm.train.preflight.inspection_page import write_page
from mllm.train.preflight.verify import ResumeReport
from tests.helpers import picture
from tests.integration.train_helpers import make_recipe


def _file(recipe, folder):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def _run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_plan_shows_joins_learning_lengths_memory_and_refuses_what_does_not_fit(tmp_path):
    path = _file(make_recipe(tmp_path), tmp_path)
    text = _run("plan", path, "--processes", "2", "stages.sft.epochs=3", "stages.sft.steps=")
    for part in (
        "3 × 28 × 28 pixels → 4 × 4",
        "learns connector",
        "memory: activations",
        "samples of one epoch",
        "steps",
    ):
        assert part in text
    assert re.search(r"steps +│ +18", text), text  # 24 samples, 3 epochs, 4 a step
    assert re.search(r"tokens of a sample, \d+ to \d+ +│ .*█", text)
    text = _run("plan", path, "--memory", "0.0001", code=1)
    assert "do not fit 0.0001 GB" in text and "gradient_checkpointing=true" in text


def test_a_page_shows_the_pixels_tokens_mask_and_packing_that_training_uses(tmp_path):
    stages = [
        {"name": "sft", "steps": 2, "packing": True, "num_workers": 0},
        {"name": "long", "steps": 1, "max_length": 50},
    ]
    recipe = make_recipe(tmp_path, stages=stages)
    packed, long = inspect_recipe(recipe, num_samples=6)
    assert packed.num_samples >= 6 and long.num_samples == 6
    row = packed.rows[0]
    assert len(row.samples) > 1 and row.bounds[0] == 0 and row.bounds[-1] == row.slots == 160
    ends = [s.offset + s.length for s in row.samples]
    assert row.bounds[1 : 1 + len(ends)] == ends and [s.offset for s in row.samples] == [0, *ends[:-1]]
    assert all(s.positions == (0, s.length - 1) for s in row.samples)
    for sample in [s for row in packed.rows for s in row.samples]:
        number = int(sample.id.removeprefix("mixed"))
        assert sample.learned == f"it is {number} " * (1 + number % 3) + "<|im_end|>"
        assert [r.stop for r in sample.runs[:-1]] == [r.start for r in sample.runs[1:]]
        images = [run for run in sample.runs if run.kind == "image"]
        assert len(images) == len(sample.pictures) and all(r.stop - r.start == 16 for r in images)
        assert "".join(r.text for r in sample.runs if r.kind == "learned") == sample.learned
        for k, shown in enumerate(sample.pictures):
            assert set(sample.ids[shown.start : shown.start + 16]) == {sample.ids[images[0].start]}
            wanted = np.asarray(
                picture(number * 7 + k, size=(28, 28))
            )  # this encoder takes 28 × 28: nothing is resized
            assert np.abs(np.asarray(shown.pixels["semantic"]).astype(int) - wanted).max() <= 1
            assert shown.pixels["detail"].size == (32, 32)
    assert any(s.truncated for row in long.rows for s in row.samples)
    page = tmp_path / "page.html"
    text = _run("inspect", _file(recipe, tmp_path), "--n", "6", "--output", str(page))
    assert "carry loss" in text and str(page) in text.replace("\n", "")
    markup = page.read_text()
    assert "http" not in markup and "<script" not in markup
    assert "<span class=learned" in markup and "<title>token" in markup and "cut at max_length" in markup
    first = re.search(r"data:image/png;base64,([^\"]+)", markup)
    assert Image.open(io.BytesIO(base64.b64decode(first[1]))).size in ((28, 28), (32, 32))


def test_inspect_shows_every_frame_with_its_time_and_none_where_nothing_tells_it(tmp_path):
    """Frames are as bright as their number says, so the page's pictures say whether a time is that of the frame beside it."""
    (tmp_path / "data").mkdir()
    painted = [np.full((28, 28, 3), 25 * number, np.uint8) for number in range(9)]
    first, *rest = [Image.fromarray(frame) for frame in painted[:7]]
    lasts, begins = [100, 400, 250, 50, 1000, 300, 100], [0.0, 0.1, 0.5, 0.75, 0.8, 1.8, 2.1]
    first.save(tmp_path / "data" / "clip.gif", save_all=True, append_images=rest, duration=lasts)
    np.save(tmp_path / "data" / "untimed.npy", np.stack(painted))
    picture(3, size=(28, 28)).save(tmp_path / "data" / "still.png")
    shown = {"clip": [("video", "clip.gif"), ("image", "still.png")], "none": [("video", "untimed.npy")]}
    rows = []
    for name, visuals in shown.items():
        content = [{"type": kind, kind: file} for kind, file in visuals] + [{"type": "text", "text": "what?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}]
        rows.append(json.dumps({"id": name, "messages": messages}))
    (tmp_path / "data" / "mixed.json").write_text("")
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(rows))
    stage = {"name": "sft", "steps": 1, "data": {"format": "messages", "path": str(tmp_path / "data" / "rows.jsonl")}}
    recipe = make_recipe(tmp_path, stages=[stage], model={"video": {"frames": 4, "fewer": {"semantic": 2}}})
    (seen,) = inspect_recipe(recipe, num_samples=2)
    samples = {sample.id: sample for row in seen.rows for sample in row.samples}

    def number_of(frame):
        return round(np.asarray(frame).mean() / 25)

    found = [(p.seconds, number_of(p.pixels["detail"])) for p in samples["clip"].pictures if p.layout.frames]
    assert [number for _, number in found] == [0, 2, 4, 6] and [time for time, _ in found] == [
        begins[number] for _, number in found
    ]
    assert [p.seconds for p in samples["clip"].pictures if not p.layout.frames] == [None]
    assert [number_of(p.pixels["detail"]) for p in samples["none"].pictures] == [0, 2, 5, 8]
    assert [p.seconds for p in samples["none"].pictures] == [None] * 4
    page = write_page([seen], tmp_path / "page.html", title="clips").read_text()
    told = re.findall(r"image 0, (frame [^<]*?) as <b>semantic", page)
    assert sorted(told) == ["frame 0", "frame 0 at 0.000 s", "frame 2", "frame 2 at 0.800 s"]
    assert "image 0, frame 3 at 2.100 s as <b>detail" in page and "image 1 as <b>detail" in page


def test_inspect_escapes_what_data_say_and_names_unknown_stages(tmp_path):
    recipe = make_recipe(tmp_path, rows=1)
    data = tmp_path / "data" / "mixed.json"
    rows = json.loads(data.read_text())
    rows[0]["conversations"][0]["value"] = "<script>alert(1)</script> & x"
    data.write_text(json.dumps(rows))
    page = tmp_path / "page.html"
    _run("inspect", _file(recipe, tmp_path), "--n", "1", "--output", str(page))
    assert "<script" not in page.read_text() and "&lt;script&gt;alert(1)" in page.read_text()
    with pytest.raises(UnknownName, match="did you mean 'sft'"):
        inspect_recipe(recipe, stage="sfd")
    recipe.stages[0].kind = "routing"
    with pytest.raises(ConfigError, match="none of kind sft"):
        inspect_recipe(recipe)


def test_two_runs_are_told_apart_by_settings_data_and_the_first_number_that_differs(tmp_path):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 3}])
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        if name == "b":
            shutil.copytree(tmp_path / "a", tmp_path / "b")
            continue
        run_recipe(recipe.model_copy(update={"seed": seed}), output=tmp_path / name)
    same = diff_runs(tmp_path / "a", tmp_path / "b")
    assert same.equal and same.common == 3
    _run("runs", "diff", str(tmp_path / "a"), str(tmp_path / "b" / "run.json"))
    other = diff_runs(tmp_path / "a", tmp_path / "c")
    assert ("recipe.seed", 3, 4) in other.settings and other.first[:2] == ("sft", 1)
    text = _run("runs", "diff", str(tmp_path / "a"), str(tmp_path / "c"), code=1)
    assert "recipe.seed" in text and "the numbers part at sft step 1" in text
    assert str(tmp_path / "a")[:20] in _run("runs", "ls", str(tmp_path))
    with pytest.raises(ConfigError, match="holds no run"):
        diff_runs(tmp_path / "a", tmp_path / "nowhere")


def test_verify_resume_passes_on_what_the_check_found(tmp_path, monkeypatch):
    from mllm.train.preflight import verify

    path = _file(make_recipe(tmp_path), tmp_path)
    asked = {}

    def report(recipe, **options):
        asked.update(options, steps_of_recipe=recipe.stages[0].steps)
        return ResumeReport(4, ["sft step 3: loss is 1.0 in the whole run and 2.0 in the killed one"])

    monkeypatch.setattr(verify, "verify_resume", report)
    text = _run("verify-resume", path, "stages.sft.steps=9", "--steps", "4", "--processes", "2", code=1)
    assert asked["steps"] == 4 and asked["processes"] == 2 and asked["steps_of_recipe"] == 9
    assert "sft step 3: loss is 1.0" in text and "NOT EXACT" in text
    monkeypatch.setattr(verify, "verify_resume", lambda *a, **k: ResumeReport(4))
    assert "exact: 4 steps" in _run("verify-resume", path)
