"""Do several checkpoints' ablations, and controls trained without an encoder, stand in one table?"""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import ConfigError
from mllm.eval.studies.ablations import named_checkpoints, read_controls
from tests.helpers import tiny_model
from tests.unit.eval.test_runner import make_data


def test_two_checkpoints_and_a_control_stand_side_by_side(tmp_path):
    model, processor = tiny_model(tmp_path / "tokenizer")
    for name in ("a", "b", "without"):
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
        model.save_pretrained(tmp_path / name / "final")
        processor.save_pretrained(tmp_path / name / "final")
    folder, output = make_data(tmp_path / "d", 6), tmp_path / "o"
    words = ["eval", "ablate", str(tmp_path / "a/final"), f"second={tmp_path / 'b/final'}", "--tasks", "demo_charts"]
    words += ["--data", f"demo_charts={folder}", "--encoders", "detail", "--modes", "drop", "--output", str(output)]
    words += ["--device", "cpu", "--control", f"a:detail={tmp_path / 'without/final'}"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    stored = json.loads((output / "ablations.json").read_text())
    headings, rows = stored["tables"][0]["headings"], stored["tables"][0]["rows"]
    assert [(row[1], row[2], row[3], row[-1]) for row in rows] == [
        ("detail", "masked: drop", "a", "6"), ("detail", "masked: drop", "second", "6"), ("detail", "retrained without", "a", "6"),
    ]  # fmt: skip
    assert headings[5:8] == ["with", "without", "change"]
    for row in rows:
        assert float(row[6]) - float(row[5]) == pytest.approx(float(row[7]), abs=0.011)
    assert any(f"trained without detail: {tmp_path / 'without/final'}" in note for note in stored["notes"])
    assert stored["data"]["checkpoints"]["a"]["effects"][0]["encoder"] == "detail"


def test_names_and_controls_are_read_or_refused():
    assert named_checkpoints(["runs/x/final", "y=runs/z/final"]) == {"x": "runs/x/final", "y": "runs/z/final"}
    with pytest.raises(ConfigError, match="two checkpoints are called 'x'"):
        named_checkpoints(["runs/x/final", "other/x/final"])
    (control,) = read_controls(["dino=c"], {"x": "p"})
    assert (control.of, control.encoder, control.checkpoint) == ("x", "dino", "c")
    for entry in ("dino=c", "z:dino=c", "x:dino", "x:=c"):
        with pytest.raises(ConfigError, match="expected NAME:ENCODER=CKPT with a NAME of x, y"):
            read_controls([entry], {"x": "p", "y": "q"})
