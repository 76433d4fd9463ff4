"""Does an agglomeration stage teach one encoder what two others see, and hand it on alone?"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.train import run_recipe
from mllm.train.stages.agglomeration.stage import AgglomerationModel, AgglomerationOptions, TeacherHead
from mllm.train.stages.kind import kind_of
from tests.helpers import TINY_CLIP
from tests.integration.test_train_contrastive import _data
from tests.integration.train_helpers import make_recipe, metrics

PPOCR = {"type": "ppocr", "image_size": 64}
TEACHERS = {"objects": TINY_CLIP, "text": PPOCR}


def _recipe(folder, **changes):
    stage = {
        "name": "alone",
        "kind": "agglomeration",
        "steps": 12,
        "batch_size": 4,
        "data": {"format": "llava", "path": _data(folder / "pairs")},
        "learn": {"encoders.student": 1e-3},
        "options": {"teachers": TEACHERS, "head_width": 32, **changes.pop("options", {})},
        **changes,
    }
    after = {"name": "sft", "steps": 1, "learn": {"connector": 1e-3}}
    model = {"encoders": {"student": TINY_CLIP}, "connector": {"type": "channel_concat"}}
    return make_recipe(folder, stages=[stage, after], model=model)


def test_a_student_comes_nearer_to_both_teachers_and_goes_on_without_them(tmp_path):
    run_recipe(_recipe(tmp_path))
    rows = [row for row in metrics(tmp_path / "run") if row["stage"] == "alone"]
    losses = [float.fromhex(row["loss"]) for row in rows]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first["head_loss"]) == {"agglomeration/objects", "agglomeration/text"}
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("alone", "final")]
    tuned = {k: v for k, v in states[0].items() if "encoders.student." in k}
    assert tuned and all(torch.equal(v, states[1][k]) for k, v in tuned.items())
    assert not any("teacher" in key or "heads." in key for key in states[0])


def test_a_head_tells_every_cell_of_the_teacher_in_its_place():
    student, teacher = (build_encoder(encoder_config(spec, where="test")) for spec in (TINY_CLIP, PPOCR))
    infos = [one.describe(one.config) for one in (student, teacher)]
    head = TeacherHead(infos[0], infos[1], 8)
    tokens = torch.randn(2, infos[1].num_tokens, infos[1].width)
    wanted = head.wanted(tokens)
    assert head(torch.randn(2, infos[0].num_tokens, infos[0].width)).shape == wanted.shape
    rows, columns = infos[1].grid
    deep, broad = rows // head.grid[0], columns // head.grid[1]
    cell = wanted[0].view(*head.grid, deep, broad, -1)[1, 0, 0, broad - 1]
    place = deep * columns + broad - 1  # first row of the second row of common cells, last column of the first
    torch.testing.assert_close(cell, torch.nn.functional.layer_norm(tokens[0, place], tokens.shape[-1:]))


def test_a_teachers_scale_does_not_count():
    torch.manual_seed(0)
    student, teacher = (build_encoder(encoder_config(TINY_CLIP, where="test")) for _ in range(2))
    options = AgglomerationOptions(teachers={"objects": TINY_CLIP}, head_width=16)
    model = AgglomerationModel("student", student, {"objects": teacher}, options, {"student": "s", "objects": "t"})
    info = student.describe(student.config).image
    pixels = torch.randn(2, 3, info.height, info.width)
    before = model(2.0, s=pixels, t=pixels).loss
    model.seen_by = lambda name, seen: 50 * teacher(seen).tokens
    torch.testing.assert_close(model(2.0, s=pixels, t=pixels).loss, before, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"options": {"teachers": {}}}, "teachers"),
        ({"options": {"weights": {"txt": 2.0}}}, "there is no teacher 'txt'"),
        ({"learn": {"connector": 1e-3}}, "trains one encoder"),
        ({"options": {"teachers": {"text": {"type": "unit"}}}}, "teachers.text"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(changes, word, tmp_path):
    recipe = _recipe(tmp_path, **changes)
    with pytest.raises(ConfigError, match=word):
        kind_of(recipe.stages[0]).check(recipe.stages[0], recipe)


def test_an_encoder_that_every_picture_is_seen_without_learns_nothing(tmp_path):
    stage = {
        "name": "sft",
        "steps": 2,
        "data": {"format": "llava", "path": _data(tmp_path / "pairs")},
        "learn": {"encoders": 1e-3, "connector": 1e-3},
        "optimizer": {"type": "adamw", "weight_decay": 0.0},
        "options": {"drop_encoders": {"left": 1.0}},
    }
    model = {"encoders": {"left": TINY_CLIP, "right": TINY_CLIP}, "connector": {"type": "channel_concat"}}
    run_recipe(make_recipe(tmp_path, stages=[{**stage, "name": "one", "steps": 1}, stage], model=model))
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("one", "final")]
    moved = {k: not torch.equal(v, states[1][k]) for k, v in states[0].items() if "encoders." in k}
    assert not any(change for key, change in moved.items() if "encoders.left." in key)
    assert any(change for key, change in moved.items() if "encoders.right." in key)
