"""Is every common layout of data recognised without a declaration, and does it say how it is read?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm.data.mixture import Mixture
from mllm.data.recognise import recognise
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.types import IMAGE_MARK
from tests.helpers import picture

CASES = Path(__file__).resolve().parents[2] / "golden" / "rows"
TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}]
TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(CASES / "a.png", tmp_path / "a.png")
    return tmp_path


def first(place: Path | str):
    """The first sample of data that nobody declared."""
    mixed = Mixture(str(place), shuffle=False)
    return mixed.sources[0].spec, mixed.sources[0][0]


@pytest.mark.parametrize(
    ("name", "rows", "format"),
    [
        ("m.jsonl", [{"images": ["a.png"], "messages": TURNS}], "messages"),
        ("m.json", [{"image": "a.png", "messages": TURNS}], "messages"),
        ("s.json", [{"image": "a.png", "conversations": TALK}], "sharegpt"),
        ("t.jsonl", [{"image": "a.png", "conversations": json.dumps(TALK)}], "sharegpt"),
        ("f.jsonl", [{"image": ["a.png"], "messages": TALK}], "sharegpt"),
        ("q.jsonl", [{"image": "a.png", "question": "What?", "answer": "It."}], "columns"),
        ("c.csv", [{"picture": "a.png", "query": "What?", "label": "It."}], "columns"),
        ("p.parquet", [{"images": ["a.png"], "texts": [{"user": "What?", "assistant": "It."}]}], "columns"),
        ("j.parquet", [{"image": "a.png", "conversations": json.dumps(TALK)}], "columns"),
    ],
)
def test_files_are_read_by_what_their_first_rows_hold(folder, name, rows, format):
    pandas = pytest.importorskip("pandas")
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("{broken\n" * (format != "columns") + "".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)
    spec = recognise(path)
    assert spec.format == format and f"read as format {format}" in spec.recognised and spec.name == path.stem
    sample = open_source(spec)[1 if path.suffix == ".jsonl" and format != "columns" else 0]
    assert (
        sample.images == [str(folder / "a.png")] and sample.turns[0].content.replace("\n", "") == f"{IMAGE_MARK}What?"
    )
    assert sample.turns[1].content == "It."


def test_folders_globs_and_saved_tables_are_read_too(folder):
    datasets = pytest.importorskip("datasets")
    for name in ("b", "c"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": TURNS}) + "\n")
    for place in (folder, folder / "*.jsonl"):
        spec, sample = first(place)
        assert spec.format == "messages" and len(open_source(spec)) == 2 and sample.images == [str(folder / "a.png")]
    features = datasets.Features(
        {"pic": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
    )
    table = datasets.Dataset.from_list([{"pic": picture(1), "q": "What?", "a": "It."}], features=features)
    table = table.rename_columns({"q": "question", "a": "answer"})
    table.save_to_disk(str(folder / "saved"))
    spec, sample = first(folder / "saved")
    assert spec.columns.image == "pic" and len(sample.images) == 1 and "image: pic" in spec.recognised
    named = Mixture([str(folder / "b.jsonl"), {"dataset": str(folder / "c.jsonl"), "repeat": 2}], shuffle=False)
    assert [source.name for source in named.sources] == ["b", "c"] and len(named) == 3


def test_what_does_not_tell_says_what_to_write(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "a.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(ConfigError, match="the first row has the keys foo"):
        recognise(folder / "a.jsonl")
    (folder / "two.jsonl").write_text('{"question": "q", "answer": "a", "img": "a.png", "photo": "b.png"}\n')
    with pytest.raises(ConfigError, match="the columns img and photo look like pictures"):
        recognise(folder / "two.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        Mixture(str(folder / "none.parquet"))
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.csv").write_text("a,b\n")
    (folder / "mixed" / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"holds \.csv, \.json files; name the file, or a glob"):
        recognise(folder / "mixed")
    with pytest.raises(DataError, match="no data set of that name loads from the hub"):
        Mixture("nobody-here/nothing")
    (folder / "wrapped.json").write_text(json.dumps({"info": 1, "data": [{"messages": TURNS}]}, indent=1))
    with pytest.raises(DataError, match=r"holds one object, and a list of rows.*under 'data' to a file of its own"):
        recognise(folder / "wrapped.json")
    (folder / "e.json").write_text("[]")
    with pytest.raises(DataError, match="holds no rows"):
        recognise(folder / "e.json")


@pytest.mark.parametrize("key", ["prompt", "question"])
def test_rows_of_two_answers_are_sent_to_the_stage_that_learns_from_them(folder, key):
    row = {"image": "a.png", key: "What?", "chosen": "It.", "rejected": "Not it."}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"kind: dpo.*as messages.*under rejected"):
        recognise(folder / "pairs.jsonl")
    for format in ("messages", "llava"):
        source = open_source(DatasetSpec(name="pairs", format=format, path=str(folder / "pairs.jsonl")))
        with pytest.raises(DataError, match="kind: dpo"):
            source[0]


def test_misnamed_pictures_are_not_guessed(folder):
    shutil.copy(CASES / "image_key_misnamed.jsonl", folder / "m.jsonl")
    spec = recognise(folder / "m.jsonl")
    assert spec.image_key is None and "no column of pictures in its first rows" in spec.recognised


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "sum up", "input": "long", "output": "short"}, r"input stands beside instruction .*\{input\}"),
        ({"question": "which?", "choices": ["x", "y"], "answer": 1}, "choices stands beside question"),
        ({"image": "a.png", "image_2": "b.png", "question": "same?", "answer": "no"}, "image_2 beside image would not"),
        ({"image": "a.png", "image2": "b.png", "messages": []}, "image2 beside image would not be read"),
    ],
)
def test_a_column_that_the_question_needs_is_not_left_out_in_silence(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        recognise(tmp_path / "a.jsonl")


def test_empty_inputs_hide_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"instruction": "say hi", "input": "", "output": "hi", "image_2": None})
    )
    assert recognise(tmp_path / "a.jsonl").columns.question == "instruction"
