"""Which verb does ``mllm eval`` run when none is named?"""

from __future__ import annotations

from typer.testing import CliRunner

from mllm.cli.evaluate import evaluation


def test_a_checkpoint_in_place_of_a_verb_is_evaluated_and_a_mistyped_verb_is_not(tmp_path):
    (tmp_path / "rescor").mkdir()
    runner = CliRunner()
    found = runner.invoke(evaluation, [str(tmp_path / "rescor"), "--tasks", "no_such_task"])
    assert "no_such_task" in f"{found.output}{found.exception}"
    mistyped = runner.invoke(evaluation, ["rescor", "predictions.jsonl"])
    assert mistyped.exit_code == 2 and "Did you mean" in mistyped.output and "rescore" in mistyped.output
