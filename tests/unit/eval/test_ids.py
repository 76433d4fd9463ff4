"""Are ids told apart in a few bytes each, and do shards and comparisons of any length take little memory?"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from functools import partial

import pytest

from mllm.errors import DataError
from mllm.eval import ids, predictions
from mllm.eval.ids import Ids, Places, RowIndex
from mllm.eval.predictions import header_path, merge_shards, prediction_path, rows_in_order, write_lines
from mllm.eval.report import columns
from mllm.eval.report.levels import Levels
from mllm.eval.report.statistics import Comparison
from mllm.eval.run import rescore
from mllm.eval.spool import Names
from mllm.eval.studies import compare
from mllm.eval.studies.compare import compare_predictions

METRICS = {"task": {"metrics": ["exact_match"]}}


@pytest.mark.parametrize("kept", [0, 5, 10_000])
def test_a_set_of_ids_is_a_set(kept):
    draw = random.Random(kept)
    names, known, found = [str(draw.randrange(900)) for _ in range(2000)], set(), Ids(kept=kept)
    for name in [*names, "", "é/\udcff"]:
        assert found.add(name) == (name not in known)
        known.add(name)
    assert len(found) == len(known) and all((str(k) in found) == (str(k) in known) for k in range(1000))
    assert "" in found and "é/\udcff" in found and "another" not in found


def test_numbers_whose_names_meet_in_one_hash_all_come(monkeypatch):
    places = Places()
    assert list(places.of("a")) == [] and list(places.met()) == []
    monkeypatch.setattr(ids, "hash", lambda name: len(name), raising=False)
    for number, name in enumerate(["aa", "b", "cc", "dd", "eee", "f"]):
        places.add(name, number)
    assert list(places.of("zz")) == [0, 2, 3] and list(places.of("z")) == [1, 5] and list(places.of("zzzz")) == []
    assert sorted(map(sorted, places.met())) == [[0, 2, 3], [1, 5]]


def shards(folder, count: int, world: int = 3, **extra) -> list[str]:
    """Rows of ``count`` ids dealt to the shards in turn."""
    names = [f"sample number {k}" for k in range(count)]
    for rank in range(world):
        path = prediction_path(folder, "t", None, rank, world)
        write_lines(path, ({"id": name, "text": "x" * 40, **extra} for name in names[rank::world]))
        header_path(path).write_text(json.dumps({"identity": {"task": "t", "version": 1}}))
    return names


@pytest.mark.parametrize("alike", [False, True])
def test_shards_join_and_gaps_are_named_also_where_hashes_meet(tmp_path, monkeypatch, alike):
    if alike:
        monkeypatch.setattr(ids, "hash", lambda name: 7, raising=False)
    monkeypatch.setattr(predictions, "Ids", partial(Ids, kept=3))
    names = shards(tmp_path, 20)
    joined = merge_shards(tmp_path, "t", names[::-1], 3)
    assert [json.loads(line)["id"] for line in joined.open()] == names[::-1]
    assert [row["id"] for row in rows_in_order(joined, [*names, "unknown"])] == names
    before = joined.read_text()
    with pytest.raises(DataError, match=r"ids 1 missing \(more\) and 2 unknown \(sample number 18, sample number 19\)"):
        merge_shards(tmp_path, "t", [*names[:18], "more"], 3)
    write_lines(prediction_path(tmp_path, "t", None, 2, 3), ({"id": name} for name in (names[2], names[3])))
    with pytest.raises(DataError, match=r"'sample number 3' is in more than one shard \(again in t\.shard-0002"):
        merge_shards(tmp_path, "t", names, 3)
    assert joined.read_text() == before and not list(tmp_path.glob(".*.part")), "nothing is written then"


def test_a_row_is_found_however_its_line_is_written(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "other order", "id": "a"}\n{"id":"b"}\n{"id": "\\u00e9"}\n')
    with RowIndex() as index:
        index.add(path, [("a", 0), ("b", 35), ("é", 46)])
        assert [index.row(name) for name in ("a", "b", "é", "c")] == [
            {"text": "other order", "id": "a"}, {"id": "b"}, {"id": "é"}, None,
        ]  # fmt: skip


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def scored_file(path, names: list[str], right: Callable[[int], bool]) -> None:
    scores = {
        True: {"value": 1.0, "extracted": "1", "rule": "equal"},
        False: {"value": 0.0, "extracted": "0", "rule": "differs"},
    }
    write_lines(
        path,
        (
            {"id": name, "output": str(int(right(k))), "target": "1", "meta": {"number": k}, "cluster": None, "category": None,
             "scores": {"exact_match v1": scores[right(k)]}}
            for k, name in enumerate(names)
        ),
    )  # fmt: skip
    header_path(path).write_text(json.dumps({"identity": {"task": "t", "version": 1, "data": "d"}} | METRICS))


def peaks(folder, count: int) -> list[int]:
    """The most bytes held while rows are joined, put in order, compared, and called hard or easy, and scored by two rules."""
    folder.mkdir()
    names = Names(shards(folder, count, answer="y" * 600))
    backwards = Names(list(names)[::-1])
    first, second = folder / "a.jsonl", folder / "b.jsonl"
    scored_file(first, list(names), lambda k: k % 3 > 0)
    scored_file(second, list(backwards), lambda k: k % 5 > 0)
    rescore(first, ["exact_match", "relaxed_strict"], write=False)  # what is imported on the way does not count
    return [
        peak_bytes(lambda: merge_shards(folder, "t", names, 3)),
        peak_bytes(lambda: sum(1 for _ in rows_in_order(first, backwards))),
        peak_bytes(lambda: compare_predictions(first, second)),
        peak_bytes(lambda: Levels().add(first)),
        peak_bytes(lambda: rescore(first, ["exact_match", "relaxed_strict"], write=False)),
    ]


def test_memory_for_a_row_more_is_a_few_bytes(tmp_path, monkeypatch):
    """As objects a row is well over 1,000 bytes."""
    monkeypatch.setattr(predictions, "Ids", partial(Ids, kept=100))
    monkeypatch.setattr(columns, "_ALIKE", 50)
    monkeypatch.setattr(
        compare, "paired_comparison", lambda a, b, **rest: Comparison(0.0, 0.0, 0.0, 1.0, 0, 0, len(a), None, "")
    )
    few, many = (peaks(tmp_path / str(count), count) for count in (400, 1_600))
    more = [(large - small) / 1_200 for small, large in zip(few, many)]
    assert all(each < limit for each, limit in zip(more, (80, 120, 500, 160, 300))), more
