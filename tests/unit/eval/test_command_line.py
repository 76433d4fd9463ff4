"""What does ``mllm eval`` run and say?"""

from __future__ import annotations

from typer.testing import CliRunner

from mllm.cli.evaluate import evaluation
from tests.unit.eval.test_runner import make_data, run


def test_a_checkpoint_in_place_of_a_verb_is_evaluated_and_a_mistyped_verb_is_not(tmp_path):
    (tmp_path / "rescor").mkdir()
    (tmp_path / "rescor" / "config.json").write_text("{}")
    runner = CliRunner()
    found = runner.invoke(evaluation, [str(tmp_path / "rescor"), "--tasks", "no_such_task"])
    assert "no_such_task" in f"{found.output}{found.exception}"
    mistyped = runner.invoke(evaluation, ["rescor", "predictions.jsonl"])
    assert mistyped.exit_code == 2 and "Did you mean" in mistyped.output and "rescore" in mistyped.output


def test_rescore_shows_the_new_scores(tmp_path):
    run(make_data(tmp_path / "d", 4), tmp_path / "o")
    said = CliRunner().invoke(
        evaluation, ["rescore", str(tmp_path / "o/demo_charts.jsonl"), "--metrics", "exact_match,anls_rrc"]
    )
    assert said.exit_code == 0 and "exact_match" in said.output and "anls_rrc" in said.output and "n=4" in said.output


def test_rescore_takes_a_runs_folder(tmp_path):
    run(make_data(tmp_path / "d", 4), tmp_path / "o")
    said = CliRunner().invoke(evaluation, ["rescore", str(tmp_path / "o"), "--metrics", "exact_match"])
    assert said.exit_code == 0 and "demo_charts" in said.output and "n=4" in said.output
    empty = CliRunner().invoke(evaluation, ["rescore", str(tmp_path / "d")])
    assert empty.exit_code != 0 and "holds no predictions" in str(empty.exception)
