"""Do training and evaluation read the same words, pictures and frames out of the same file, whatever its format?"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mllm.data.files import CsvRows
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import DataError
from mllm.eval.data.loading import load_data
from mllm.eval.task import TaskSpec
from mllm.processing.images import image_hash, load_image
from mllm.processing.videos import open_video
from mllm.types import Video
from tests.helpers import picture
from tests.videos import write_clip

WORDS = ["007", "None", "3.10", "2014-01-01", "true", 'a "b", c\nd', "é漢😀", "NA"]
"""Answers that a reader which guesses types makes something else of."""
FORMATS = ["csv", "tsv", "jsonl", "json", "parquet", "parquet of bytes"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row a word, each with its picture in another of the ways a text can refer to one."""
    found = []
    for number, word in enumerate(WORDS):
        path = folder / f"{number} %20.png"
        picture(number).save(path)
        text = base64.b64encode(path.read_bytes()).decode()
        ways = [path.name, str(path), path.as_uri(), f"data:image/png;base64,{text}", text]
        found.append({"id": f"i{number}", "q": f"what is {word}?", "a": word, "image": ways[number % len(ways)]})
    return found


def write(folder: Path, kind: str) -> Path:
    path = folder / f"t.{kind.split()[0]}"
    table = rows(folder)
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "json":
        path.write_text(json.dumps(table, indent=1, ensure_ascii=False))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {key: pa.array([row[key] for row in table]) for key in table[0]}
        if kind == "parquet of bytes":
            stored = [{"bytes": (folder / f"{k} %20.png").read_bytes(), "path": f"{k}.png"} for k in range(len(WORDS))]
            stored[3] = {"bytes": None, "path": "3 %20.png"}
            columns["image"] = pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def task(kind: str, images: str = "image", **options: Any) -> TaskSpec:
    columns = {"id": "id", "question": "q", "answers": "a", "images": images}
    source = {"name": "s", "format": kind.split()[0], "files": [f"t.{kind.split()[0]}"], "columns": columns}
    return TaskSpec.model_validate(
        {"name": "t", "version": 1, "description": "d", "sources": [source], "prompt": "{{ question }}",
         "metrics": ["exact_match"], **options}
    )  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_training_and_evaluation_read_the_same_row(tmp_path, kind):
    path = write(tmp_path, kind)
    columns = {"id": "id", "question": "q", "answer": "a", "image": "image"}
    trained = open_source(DatasetSpec(name="t", format="columns", path=str(path), columns=columns))
    items = load_data(task(kind), data={"t": tmp_path}).items
    assert len(trained) == len(items) == len(WORDS)
    for number, (item, word) in enumerate(zip(items, WORDS)):
        sample = trained[number]
        assert sample.id == item.id == f"i{number}"
        assert item.turns[0].content == sample.turns[0].content
        assert sample.turns[1].content == item.target == word
        (shown,), (asked,) = sample.images, item.pictures
        if isinstance(shown, dict) and not shown["bytes"]:
            shown = tmp_path / shown["path"]
        image, digest = asked.load()
        assert digest == image_hash(shown) == hashlib.sha256((tmp_path / f"{number} %20.png").read_bytes()).hexdigest()
        assert image.tobytes() == load_image(shown, where="w").tobytes()


@pytest.mark.parametrize("kind", ["clip", "folder"])
def test_training_and_evaluation_read_the_same_frames(tmp_path, kind):
    if kind == "clip":
        write_clip(tmp_path / "v.mp4", 12)
        place = "v.mp4"
    else:
        place = "v"
        (tmp_path / place).mkdir()
        for number in range(12):
            picture(number).save(tmp_path / place / f"{number}.png")  # 10 comes after 9
    row = {"id": "i", "q": "what happens?", "a": "nothing", "video": place}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"question": "q", "answer": "a", "video": "video"}
    (film,) = open_source(DatasetSpec(name="t", format="columns", path=str(tmp_path / "t.jsonl"), columns=columns))[
        0
    ].images
    (frames,) = load_data(task("jsonl", "video | video(_frames)", frames=3), data={"t": tmp_path}).items[0].pictures
    assert isinstance(film, Video)
    clip = open_video(film, where="w")
    assert clip.count == 12
    expected = [image.tobytes() for image in clip.read([2, 6, 10])]  # the middles of three equal parts
    assert [image.tobytes() for image, _ in frames.load()] == expected


def test_rows_of_a_csv_are_read_by_number_as_pythons_own_reader_reads_them(tmp_path):
    path = tmp_path / "t.csv"
    text = 'a,b\r\n1,"x\r\ny"\r\n\r\n"é""q",\r\n3\r\n漢,"p,\n,q"'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    with path.open(encoding="utf-8-sig", newline="") as file:
        expected = list(csv.DictReader(file))
    found = CsvRows(path)
    assert [found[number] for number in reversed(range(len(found)))] == expected[::-1] and len(found) == 4
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"t\.csv:3: the row has more cells than the header"):
        CsvRows(path)[1]
    path.write_bytes(b"a,b\n\xff,2\n")
    with pytest.raises(DataError, match=r"t\.csv: not readable as a table of text \(.*0xff"):
        CsvRows(path)


def test_a_table_of_several_pictures_keeps_its_null_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    some = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]
    table = {"id": ["a", "b", "c"], "q": ["?"] * 3, "a": ["x"] * 3, "image": pa.array([some, None, []], pa.list_(cell))}
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=1)
    items = load_data(task("parquet"), data={"t": tmp_path}).items
    assert [[shown.read() for shown in item.pictures] for item in items] == [[b"one", b"two"], [], []]
    waiting = pickle.dumps(list(items))  # as a long benchmark's questions lie on disk: without pictures
    assert b"one" not in waiting
    assert [shown.read() for shown in pickle.loads(waiting)[0].pictures] == [b"one", b"two"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_text_table_can_be_streamed_and_its_late_columns_are_found(tmp_path, kind):
    columns = {"question": "q", "answer": "a", "image": "image"}
    if kind == "csv":
        (tmp_path / "t.csv").write_text("q,a,image\nwhat?,1,\nwhich?,2,a.png\n")
    else:
        lines = [{"q": "what?", "a": "1"}] * 1001 + [{"q": "which?", "a": "2", "image": "a.png"}]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    count = 2 if kind == "csv" else 1002
    options: dict[str, Any] = {
        "name": "t",
        "format": "columns",
        "path": str(tmp_path / f"t.{kind}"),
        "columns": columns,
    }
    for streaming in ({}, {"streaming": True, "rows": count + 1}):
        found = open_source(DatasetSpec(**options, **streaming))
        assert found[0].images == [] and found[count - 1].images == [str(tmp_path / "a.png")]
    with pytest.raises(DataError, match=f"the stream has no row {count}, and rows declares {count + 1}"):
        found[count]
