"""Does the check find every kind of damage, and does training then leave exactly those rows out?"""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mllm.data.check import check, check_source
from mllm.data.lookup import load_dataset
from mllm.data.mixture import Mixture
from mllm.data.quarantine import read_quarantine
from mllm.data.recognise import recognise
from mllm.data.sources import open_source
from mllm.errors import ConfigError, DataError
from tests.helpers import picture, tiny_tokenizer
from tests.unit.data.test_collate_and_dataset import processor  # noqa: F401  (fixture)


@pytest.fixture
def damaged(tmp_path):
    rows = []
    for i in range(12):
        picture(i).save(tmp_path / f"{i}.png")
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "what?"}]
        rows.append(
            {"id": f"s{i}", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}]}
        )
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes()[:80])
    (tmp_path / "3.png").unlink()
    rows[4]["images"] = ["0.png"]
    rows[5]["messages"] = rows[5]["messages"][:1]
    rows[6]["messages"][1]["content"] = "  "
    rows[7]["messages"][0]["role"] = "robot"
    rows[8] = {**rows[0], "id": "s0"}
    rows[9]["messages"][0]["content"] = "text only"
    rows[10]["messages"][0]["content"][0]["image"] = "https://example.org/a.png"
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


KINDS = {1: "corrupt image", 3: "missing image", 4: "placeholders", 5: "no labels", 6: "no labels", 7: "unreadable",
         10: "missing image", 12: "unreadable"}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_every_kind_of_damage_is_found_and_quarantined(damaged, processes):
    report = check(damaged, processes=processes, progress=False, write=True)
    assert {p.row: p.kind for p in report.problems} == KINDS
    assert report.num_bad == 8 and report.checked == report.rows == 13
    assert report.duplicates == [(8, 0)] and report.num_repeated_ids == 1 and report.num_text_only == 1
    assert all(p.id in p.reason or p.id == str(p.row) for p in report.problems)
    lines = [json.loads(line) for line in report.quarantine.read_text().splitlines()]
    assert report.quarantine == damaged.with_name("bad.jsonl.quarantine.jsonl")
    assert lines[0]["fingerprint"] == report.fingerprint and [line["row"] for line in lines[1:]] == sorted(KINDS)
    mixed = Mixture({"format": "messages", "path": str(damaged)})
    assert sorted(d.row for d in mixed.locate(range(len(mixed)))) == [0, 2, 8, 9, 11]


def test_the_report_prints_and_a_repaired_file_has_an_empty_list(damaged):
    out = io.StringIO()
    check(damaged, progress=False).print(Console(file=out, width=200))
    assert "nothing was written" in out.getvalue() and not damaged.with_name("bad.jsonl.quarantine.jsonl").exists()
    check(damaged, progress=False, write=True).print(Console(file=out, width=200))
    text = out.getvalue()
    for phrase in ("13 of 13 rows", "do not decode", "1.png", "row 8 repeats row 0", "8 rows on the quarantine list"):
        assert phrase in text, phrase
    good = [line for i, line in enumerate(damaged.read_text().splitlines()) if i not in KINDS]
    damaged.write_text("\n".join(good))
    with pytest.raises(DataError, match="another version of bad"):
        Mixture({"format": "messages", "path": str(damaged)})
    report = check_source(str(damaged), write=True)
    assert report.num_bad == 0 and len(report.quarantine.read_text().splitlines()) == 1
    assert len(Mixture({"format": "messages", "path": str(damaged)})) == 5


def test_lengths_are_counted_as_the_model_sees_them(damaged, processor):  # noqa: F811
    report = check(damaged, processor, progress=False, write=False)
    assert report.lengths[0] == report.lengths[2] > report.lengths[9] > 0 and report.lengths[1] == 0
    assert report.as_dict()["tokens"]["max"] == report.lengths.max()
    text = check(damaged, tiny_tokenizer(), progress=False, write=False)
    assert 0 < text.lengths[0] < report.lengths[0]
    tight = check(damaged, processor, max_length=12, progress=False, write=False)
    assert {p.kind for p in tight.problems} >= {"too long"} and tight.quarantine is None
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    assert "tokens: p50" in out.getvalue()


def test_limit_quarantine_place_and_images_folder(damaged, tmp_path):
    report = check_source(damaged, limit=3, quarantine=tmp_path / "q" / "list.jsonl")
    assert report.checked == 3 and [p.row for p in report.problems] == [1]
    assert (tmp_path / "q" / "list.jsonl").is_file()
    elsewhere = check_source(damaged, image_root=tmp_path / "nowhere", limit=1, quarantine=tmp_path / "l.jsonl")
    assert "nowhere" in elsewhere.problems[0].reason


def test_files_explain_themselves_or_say_what_to_write(tmp_path, damaged):
    assert recognise(damaged).format == "messages"
    cases = {
        "sharegpt": {"conversations": []},
        "columns": {"question": "q", "answer": "a", "image": "x.png"},
    }
    for format, row in cases.items():
        path = tmp_path / f"{format}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert recognise(path).format == format
    (tmp_path / "odd.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(ConfigError, match="the first row has the keys foo"):
        recognise(tmp_path / "odd.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder: nothing\.jsonl"):
        check("nothing.jsonl")
    with pytest.raises(ConfigError, match="unknown dataset 'demo_chart', did you mean 'demo_charts'"):
        check("demo_chart")


def test_a_list_from_before_the_pictures_arrived_leaves_out_only_what_is_still_bad(damaged, tmp_path):
    from mllm.data.quarantine import read_quarantine
    from mllm.data.sources import open_source

    report = check(damaged, progress=False, write=True)
    source = open_source(recognise(damaged))
    assert sorted(read_quarantine(source).rows) == sorted(KINDS)
    picture(3).save(tmp_path / "3.png")  # it arrived
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes()[:90])  # other contents: to be judged anew
    found = read_quarantine(source)
    assert sorted(found.stale) == [1, 3] and sorted(found.rows) == sorted(set(KINDS) - {1, 3})
    mixed = Mixture({"format": "messages", "path": str(damaged)})
    (line,) = mixed.left_out()
    assert "6 of 13 rows are left out by" in line and "2 rows on that list are trained on again" in line
    assert "2 no labels" in line and mixed.fingerprints["bad"] != source.fingerprint
    again = check(damaged, progress=False)
    assert "trained on again" in (again.found_list or "") and again.quarantine is None
    older = [json.loads(line) for line in report.quarantine.read_text().splitlines()]
    report.quarantine.write_text(
        "".join(json.dumps({k: v for k, v in e.items() if k not in ("image", "content")}) + "\n" for e in older)
    )
    assert 3 in read_quarantine(source).stale and 10 in read_quarantine(source).rows


def test_what_depends_on_tokenizer_or_settings_stays_off_the_list(damaged, processor):  # noqa: F811
    report = check(damaged, processor, max_length=12, progress=False, write=True)
    assert {p.kind for p in report.problems} >= {"too long"}
    kinds = [json.loads(line).get("kind") for line in report.quarantine.read_text().splitlines()]
    assert "too long" not in kinds and "corrupt image" in kinds


def test_the_command_writes_only_when_asked_and_says_how_it_read_the_file(damaged, tmp_path):
    from typer.testing import CliRunner

    from mllm.cli.main import app

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = damaged.rename(elsewhere / damaged.name)
    listed = moved.with_name("bad.jsonl.quarantine.jsonl")
    missing = CliRunner().invoke(app, ["data", "check", str(moved)])
    assert missing.exit_code == 1 and not listed.exists()
    told = " ".join(missing.output.split())
    assert (
        "has no declaration; by its first rows it is read as format messages" in told and "nothing was written" in told
    )
    misnamed = tmp_path / "misnamed.jsonl"
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
    misnamed.write_text(json.dumps({"id": 1, "img_path": "0.png", "conversations": talk}) + "\n")
    shown = " ".join(CliRunner().invoke(app, ["data", "check", str(misnamed)]).output.split())
    assert "pictures are read from image or images, the row has the keys id, img_path, conversations" in shown
    found = CliRunner().invoke(app, ["data", "check", str(moved), "--image-root", str(tmp_path), "--write-quarantine"])
    assert found.exit_code == 1 and len(listed.read_text().splitlines()) == 1 + len(KINDS)


def test_masks_that_do_not_read_or_fit_are_found_and_listed(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.fromarray(np.full((6, 8), 2, np.uint8)).save(tmp_path / "two.png")
    good = {"size": [6, 8], "counts": [0, 4, 44]}
    bad = ["two.png", {"size": [8, 6], "counts": [0, 48]}, {"size": [6, 8], "counts": [0, 10, 500]}, "none.png"]
    said = [{"role": "user", "content": "<image>\nIt?"}, {"role": "assistant", "content": "[SEG]"}]
    rows = [
        {"id": f"r{n}", "images": ["a.png"], "messages": said, "masks": [m]} for n, m in enumerate([good, None, *bad])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(path, progress=False, write=True)
    assert [(p.row, p.kind) for p in report.problems] == [(n, "masks") for n in range(2, 6)]
    for problem, words in zip(report.problems, ("holds the value 2", "6 × 8 pixels", "cover 510 pixels", "none.png")):
        assert words in problem.reason, problem.reason
    assert set(read_quarantine(open_source(load_dataset(str(path)))).rows) == {2, 3, 4, 5}
    Image.fromarray(np.ones((6, 8), np.uint8)).save(tmp_path / "two.png")  # mended: trained on again
    assert set(read_quarantine(open_source(load_dataset(str(path)))).rows) == {3, 4, 5}
