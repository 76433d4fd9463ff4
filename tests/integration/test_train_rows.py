"""Does a run go on over odd and bad rows, and does it say which it left out, replaced, and why?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm.data.check import check
from mllm.errors import ConfigError, DataError
from mllm.train import run_recipe
from mllm.train.preflight.plan import plan_recipe
from tests.integration.train_helpers import make_recipe

CASES = Path(__file__).resolve().parents[1] / "golden" / "rows"
GOOD = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}],
}
BAD = ("messages_no_images", "lone_surrogate")
ODD = ("nul_char", "special_in_user", "special_in_answer")


def write_rows(folder: Path) -> Path:
    """63 good rows, three odd ones, two bad ones, one whose picture is gone, one with nothing to learn."""
    folder.mkdir()
    shutil.copy(CASES / "a.png", folder / "a.png")
    rows = [{"id": f"g{k}", **GOOD} for k in range(63)]
    for place, name in enumerate((*BAD, *ODD)):
        rows.insert(5 + 9 * place, {**json.loads((CASES / f"{name}.jsonl").read_text()), "id": name})
    rows.insert(20, {"id": "gone", **GOOD, "images": ["gone.png"]})
    rows.insert(30, {"id": "mute", **GOOD, "messages": GOOD["messages"][:1]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_bad_rows_are_replaced_counted_and_told_and_a_list_is_honoured_while_it_holds(tmp_path, capsys, packing):
    path = write_rows(tmp_path / "data")
    data = {"format": "messages", "path": str(path)} if packing else str(path)
    if not packing:
        assert {p.id for p in check(path, progress=False, write=True).problems} >= {"gone", "mute"}
        shutil.copy(CASES / "a.png", path.with_name("gone.png"))  # arrives after the check
    stage = {"name": "sft", "epochs": 1, "batch_size": 8, "data": data, "packing": packing}
    run_recipe(make_recipe(tmp_path, stages=[stage]))
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["sft"]
    told = "".join(capsys.readouterr())
    if packing:
        assert record["dropped"] == {"rows": 4} and record["quarantined"] == {}
        assert sum(record["dropped_reasons"]["rows"].values()) == 4
        assert "sft: 4 rows of rows could not be used and were replaced (" in " ".join(told.split())
        lines = (tmp_path / "run" / "dropped" / "sft-0.jsonl").read_text()
        assert all(name in lines for name in ("image_path", "surrogate", "gone.png", "no token carries loss"))
        assert not any(name in lines for name in ODD)
        return
    listed = record["quarantined"]["rows"]
    assert listed["rows"] == 3 and listed["stale"] == 1 and listed["kinds"]["no labels"] == 1
    assert record["dropped"] == {} and "it is read as format messages" in " ".join(told.split())
    assert "sft: rows: 3 of 70 rows are left out by" in " ".join(told.split()) and "trained on again" in told


@pytest.mark.parametrize("engine", ["none", "zero1"])
def test_training_says_which_settings_mean_nothing_and_which_part_never_learned(tmp_path, capsys, engine):
    path = tmp_path / "text.jsonl"
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    path.write_text((json.dumps({"messages": talk}) + "\n") * 8)
    stage = {"name": "sft", "steps": 2, "data": str(path), "schedule": {"warmup": 5}, "save_every": 9}
    run_recipe(make_recipe(tmp_path, stages=[{**stage, "engine": engine}]))
    told = " ".join("".join(capsys.readouterr()).split())
    assert "! sft: schedule.warmup 5 is not shorter than the 2 steps" in told
    assert "! sft: save_every 9 is beyond the 2 steps" in told
    assert "! sft: connector learned nothing, its gradient was zero in every step" in told
    assert "language_model learned nothing" not in told
    planned = plan_recipe(make_recipe(tmp_path, stages=[stage])).stages[0].hazards
    assert any("schedule.warmup 5" in line for line in planned) and any("save_every 9" in line for line in planned)
    assert any("connector learns, and none of the 8 samples looked at has an image" in line for line in planned)
    with pytest.raises(ConfigError, match=r"stages\.sft\.options\.beta: unknown key"):
        run_recipe(make_recipe(tmp_path / "other", stages=[{**stage, "options": {"beta": 1}}]))


def test_a_run_stops_when_more_than_its_share_is_bad(tmp_path):
    path = write_rows(tmp_path / "data")
    rows = path.read_text().splitlines()
    path.write_text("\n".join(row.replace("a.png", "none.png") if k % 3 else row for k, row in enumerate(rows)))
    stage = {"name": "sft", "steps": 30, "batch_size": 8, "data": {"format": "messages", "path": str(path)}}
    with pytest.raises(
        DataError, match=r"samples tried so far cannot be used, more than max_bad_share 0.05 .*no such image"
    ):
        run_recipe(make_recipe(tmp_path, stages=[stage]))


def test_a_key_or_a_folder_that_no_row_has_is_told_before_anything_is_built(tmp_path):
    path = write_rows(tmp_path / "data")
    path.write_text(path.read_text().replace('"images"', '"img"'))
    stage = {"name": "sft", "steps": 2, "data": {"format": "messages", "path": str(path)}}
    with pytest.raises(
        DataError,
        match=r"^stages\.sft\.data: of .* 16 rows were tried and none can be used\. .*'g0'.*declare image_key: img",
    ):
        run_recipe(make_recipe(tmp_path, stages=[stage]))
    hazards = plan_recipe(make_recipe(tmp_path, stages=[stage])).stages[0].hazards
    assert any("16 rows were tried and none can be used" in line for line in hazards)
    stage["data"] |= {"image_key": "img", "image_root": str(tmp_path)}
    with pytest.raises(DataError, match=r"none can be used\. .*'g0'.*: no such image file: .*is image_root the folder"):
        run_recipe(make_recipe(tmp_path, stages=[stage]))
    assert not (tmp_path / "run").exists()
