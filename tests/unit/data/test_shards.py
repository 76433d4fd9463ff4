"""Are rows of tar, parquet and jsonl shards read whole, each once, in an order that a killed run goes on with, wherever they lie?"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import fsspec
import fsspec.implementations.local
import pytest

from mllm.data.check import check
from mllm.data.collate import Batch
from mllm.data.dataset import DropLog, dropped_rows
from mllm.data.lookup import load_mixture
from mllm.data.mixture import Mixture
from mllm.data.shards import read
from mllm.data.shards.names import expand_braces, find_shards, is_sharded
from mllm.data.shards.stream import ShardStream, merged
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.processing.chat import encode_sample, encode_text
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.processor import MllmProcessor
from mllm.processing.template import read_template
from mllm.types import ImageSpec, ViewLayout
from tests.helpers import picture, tiny_tokenizer

SHARDS, ROWS = 5, 7
PATTERN = "shard-{000..004}"


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def conversation(number: int) -> dict:
    words = "word " * (number % 5)
    human = {"from": "human", "value": f"<image>\nquestion {number}"}
    return {"conversations": [human, {"from": "gpt", "value": f"{words}answer {number}"}], "image": f"old/{number}.png"}


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members(number: int) -> list[tuple[str, bytes]]:
    return [(f"s{number:03d}.png", jpeg(number)), (f"s{number:03d}.json", json.dumps(conversation(number)).encode())]


def shard(index: int, rows: int = ROWS) -> bytes:
    return tar([member for row in range(rows) for member in members(index * ROWS + row)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five shards of seven rows each: tar, parquet and jsonl of the same rows."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("shards")
    for index in range(SHARDS):
        name = f"shard-{index:03d}"
        (folder / f"{name}.tar").write_bytes(shard(index))
        numbers = range(index * ROWS, (index + 1) * ROWS)
        rows = [
            {"id": f"s{k:03d}", "q": f"question {k}", "a": f"answer {k}", "image": {"bytes": jpeg(k), "path": None}}
            for k in numbers
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=3)
        lines = [
            json.dumps({**conversation(k), "id": f"s{k:03d}", "image": None, "images": [f"{k}.png"]}) for k in numbers
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for number in range(SHARDS * ROWS):
        (folder / f"{number}.png").write_bytes(jpeg(number))
    return folder


@pytest.fixture(scope="module")
def processor() -> MllmProcessor:
    images = MllmImageProcessor(
        encoders={"main": ImageSpec(height=8, width=8)}, layout=ViewLayout(num_tokens=4, grid=(2, 2))
    )
    return MllmProcessor(images, tiny_tokenizer(), chat_template=read_template("chatml"))


def declared(folder: Path | str, kind: str = "tar", **changes) -> dict:
    spec = {"name": "d", "path": f"{folder}/{PATTERN}.{kind}", "format": "llava", "shuffle_buffer": 8}
    if kind == "parquet":
        spec |= {"format": "columns", "columns": {"question": "q", "answer": "a", "image": "image", "id": "id"}}
    else:
        spec["rows"] = SHARDS * ROWS
    if kind == "jsonl":
        spec["image_root"] = str(folder)
    return spec | changes


def stream(spec: dict | Mixture, processor: MllmProcessor, *, packed: int | None = None, **options) -> ShardStream:
    mixture = spec if isinstance(spec, Mixture) else Mixture(spec, seed=3)
    return ShardStream(
        mixture,
        partial(encode_sample, processor, max_length=packed or 256),
        **{"batch_size": 2, "pad_token_id": 0, "buffer": 8, "max_length": packed, **options},
        count=lambda sample: len(encode_text(processor, sample.turns)[0]) + 3,
    )


def contents(batch: Batch) -> tuple:
    pixels = round(float(batch.inputs["pixel_values"].double().sum()), 4)
    return batch.ids, batch.inputs["input_ids"].tolist(), pixels, batch.dropped


ALL = {f"s{k:03d}" for k in range(SHARDS * ROWS)}


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_every_row_comes_once_in_a_pass_with_its_picture(folder, processor, kind):
    mixture = Mixture(declared(folder, kind), seed=3)
    assert len(mixture) == SHARDS * ROWS and mixture.sources[0][5].id == "s005"
    batches = list(islice(stream(mixture, processor, batch_size=5), 7))
    ids = [name for batch in batches for name in batch.ids]
    assert set(ids) == ALL and ids != sorted(ids) and not any(batch.dropped for batch in batches)
    for batch in batches[:2]:
        shown = processor.image_processor([picture(int(name[1:])) for name in batch.ids])["pixel_values"]
        assert (batch.inputs["pixel_values"] == shown).all()
    again = list(islice(stream(mixture, processor, batch_size=5), 14))[7:]
    assert {name for batch in again for name in batch.ids} == ALL and [b.ids for b in again] != [b.ids for b in batches]


@pytest.mark.parametrize("packed", [None, 64])
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_a_killed_run_goes_on_at_the_same_row(folder, processor, kind, packed):
    """Whichever batch it was killed after: inside a window, at its end, and with rows prefetched by workers beyond it."""
    whole = [contents(b) for b in islice(stream(declared(folder, kind), processor, packed=packed), 30)]
    for done in (1, 4, 7, 21):
        first = stream(declared(folder, kind), processor, packed=packed)
        assert [contents(b) for b in islice(first, done)] == whole[:done]
        state = json.loads(json.dumps(merged([first.state_dict()])))
        resumed = stream(declared(folder, kind), processor, packed=packed)
        resumed.load_state_dict(state)
        assert [contents(b) for b in islice(resumed, 8)] == whole[done : done + 8]


def test_workers_share_the_shards_and_resume_exactly(folder, processor):
    def two(**options):
        return stream(declared(folder), processor, num_workers=2, **options)

    whole = [contents(b) for b in islice(two(), 16)]
    inside = stream(declared(folder), processor, lanes_per_process=2)  # the same lanes, in this process
    assert [contents(b) for b in islice(inside, 16)] == whole
    first = two()
    iterator = iter(first)
    for _ in range(5):  # an odd number: the next batch is the second worker's
        next(iterator)
    state = json.loads(json.dumps(merged([first.state_dict()])))
    del iterator
    resumed = two()
    resumed.load_state_dict(state)
    assert [contents(b) for b in islice(resumed, 6)] == whole[5:11]


def test_the_number_of_workers_may_change_between_batches_where_it_divides_the_lanes(folder, processor):
    whole = [contents(b) for b in islice(stream(declared(folder), processor, lanes_per_process=4), 9)]
    changing, seen = stream(declared(folder), processor, lanes_per_process=4, num_workers=2), []
    for workers, count in ((2, 3), (1, 1), (0, 2), (2, 3)):
        changing.num_workers = workers
        seen += [contents(b) for b in islice(changing, count)]
    assert seen == whole


def test_processes_read_different_rows_and_other_numbers_of_them_go_on(folder, processor):
    def ranks(world: int, state: dict | None = None) -> list[ShardStream]:
        options = {"world_size": world, "total": 70, "buffer": 2}
        found = [stream(declared(folder), processor, rank=rank, **options) for rank in range(world)]
        for one in found if state else ():
            one.load_state_dict(state)
        return found

    two = ranks(2)
    seen = [[name for batch in islice(one, 3) for name in batch.ids] for one in two]
    assert not set(seen[0]) & set(seen[1])
    state = json.loads(json.dumps(merged([one.state_dict() for one in two])))
    (one,) = ranks(1, state)
    assert one.num_batches == 29
    after = [name for batch in islice(one, 8) for name in batch.ids]
    assert not set(after) & {*seen[0], *seen[1]}, "rows of before came again within the pass"
    with pytest.raises(ConfigError, match=r"at most 2 processes can go on with it, not 3"):
        ranks(3, state)


def test_lanes_without_a_shard_of_their_own_share_one(folder, processor):
    spec = declared(folder, path=f"{folder}/shard-001.tar", rows=ROWS)
    lanes = [stream(spec, processor, rank=rank, world_size=3, batch_size=1, buffer=2) for rank in range(3)]
    assert len({name for lane in lanes for batch in islice(lane, 2) for name in batch.ids}) == 6


def test_packed_rows_are_full_and_lose_no_row(folder, processor):
    one = iter(stream(declared(folder), processor, packed=768, buffer=SHARDS * ROWS, batch_size=1))
    batches = list(takewhile(lambda batch: batch.position.place.window == 0, one))
    assert sorted(name for batch in batches for name in batch.ids) == sorted(ALL)
    used = sorted(sum(map(sum, batch.lengths)) / 768 for batch in batches)
    assert len(used) == 3 and min(used[1:]) > 0.9, "all but the last are full"


def test_a_store_is_read_like_a_disk(folder, processor):
    memory = fsspec.filesystem("memory")
    for index in range(SHARDS):
        memory.pipe(f"/bucket/shard-{index:03d}.tar", shard(index))
    there = [contents(b) for b in islice(stream(declared("memory://bucket"), processor), 10)]
    assert there == [contents(b) for b in islice(stream(declared(folder), processor), 10)]
    by_glob = declared("", path="memory://bucket/*.tar")
    assert len(Mixture(by_glob).sources[0].shards.shards) == SHARDS
    assert Mixture(declared(f"file://{folder}")).sources[0][0].id == "s000"


def test_a_mixture_draws_shards_and_files_by_their_shares(folder, processor):
    rows = [{**conversation(k), "id": f"file{k}", "image": f"{k}.png"} for k in range(10)]
    (folder / "plain.json").write_text(json.dumps(rows))
    mixture = {
        "datasets": [
            {"dataset": declared(folder), "weight": 3},
            {"dataset": {"name": "f", "format": "llava", "path": str(folder / "plain.json")}, "weight": 1},
        ]
    }
    options = {"num_workers": 1, "batch_size": 4}
    whole = [contents(b) for b in islice(stream(Mixture(mixture, seed=1), processor, **options), 12)]
    share = Counter(name[:1] for ids, *_ in whole for name in ids)
    assert 24 <= share["s"] <= 42 and share["s"] + share["f"] == 48
    first = stream(Mixture(mixture, seed=1), processor, **options)
    list(islice(first, 5))
    resumed = stream(Mixture(mixture, seed=1), processor, **options)
    resumed.load_state_dict(merged([first.state_dict()]))
    assert [contents(b) for b in islice(resumed, 5)] == whole[5:10]


# ------------------------------------------------------------------------------------------------------------ what is damaged


def spoiled(folder: Path, tmp_path: Path, **shards: bytes) -> dict:
    for index in range(SHARDS):
        name = f"shard-{index:03d}"
        (tmp_path / f"{name}.tar").write_bytes(shards.get(f"n{index}", shard(index)))
    return declared(tmp_path)


def test_damage_is_named_and_counted_and_the_rest_is_read(folder, processor, tmp_path):
    flipped, cut = bytearray(shard(1)), shard(2)
    with tarfile.open(fileobj=io.BytesIO(shard(1))) as file:
        header = file.getmember("s009.json").offset
    flipped[header : header + 100] = b"\xff" * 100
    twice = tar([*members(21), *members(22)[:1], *members(22), *members(23)])
    spec = spoiled(folder, tmp_path, n0=b"", n1=bytes(flipped), n2=cut[: len(cut) // 2], n3=twice)
    log = DropLog(tmp_path / "dropped" / "s-0.jsonl")
    batches = list(islice(stream(spec, processor, batch_size=4, on_drop=log), 8))
    seen = {name for batch in batches for name in batch.ids}
    expected = {f"s{k:03d}" for k in (7, 8, 11, 12, 13, 21, 23, *range(28, 35))}
    assert expected <= seen and not seen & {"s009", "s010", "s022"}
    lines = [json.loads(line) for line in (tmp_path / "dropped" / "s-0.jsonl").read_text().splitlines()]
    reasons = {(Path(line["shard"]).name, line["id"]): line["reason"] for line in lines}
    assert "shard-000.tar, row 0: the shard holds no rows" in reasons["shard-000.tar", ""]
    assert f"damaged at byte {header}" in reasons["shard-001.tar", "s009"]
    assert "members may be missing" in reasons["shard-001.tar", "s010"]
    assert any("cut short" in text for (name, _), text in reasons.items() if name == "shard-002.tar")
    assert "two members are named s022.png" in reasons["shard-003.tar", "s022"]
    kinds = dropped_rows(tmp_path / "dropped", "s")["d"]
    assert kinds["empty shard"] == 1 and kinds["damaged tar member"] == 4, "each once, however often it was met"


def test_a_member_that_is_no_json_and_a_picture_that_is_missing_are_one_row_each(processor, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([*members(1), ("s002.json", b"{"), members(3)[1], *members(4)]))
    spec = declared("", path=str(tmp_path / "a.tar"), rows=4)
    batches = list(islice(stream(spec, processor), 2))
    dropped = {item.id: item.reason for batch in batches for item in batch.dropped}
    assert {name for batch in batches for name in batch.ids} == {"s001", "s004"}
    assert "not valid JSON" in dropped["s002"] and "old/3.png" in dropped["s003"] and "a.tar, row 2" in dropped["s003"]


def test_shards_without_a_row_of_use_end_the_run(processor, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([]))
    with pytest.raises(DataError, match=r"none of 1 shards, .*a\.tar the last, holds a row"):
        next(iter(stream(declared("", path=str(tmp_path / "a.tar")), processor)))


def test_a_shard_that_is_missing_is_named_before_anything_is_read(folder, tmp_path):
    with pytest.raises(DataError, match=r"of 7 shards \S*shard-005\.tar and 1 more are missing"):
        Mixture(declared("", path=f"{folder}/shard-{{000..006}}.tar"))
    for index in (0, 1, 3):
        (tmp_path / f"x-{index:02d}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x-02\.tar is missing between the 3 shards found.*by braces: \{00,01,03\}"):
        Mixture(declared("", path=f"{tmp_path}/*.tar"))
    assert list(find_shards(f"{tmp_path}/x-{{00,01,03}}.tar", where="d")) == [
        f"{tmp_path}/x-0{k}.tar" for k in (0, 1, 3)
    ]
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "t-00000-of-00003.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"t-00001-of-00003\.tar and 1 more are missing"):
        find_shards(str(tmp_path / "y"), where="d")


class Flaky(fsspec.implementations.local.LocalFileSystem):
    """A store whose network is gone for some reads."""

    protocol = "flaky"
    failures = 0
    reads = 0
    every = 3

    def _open(self, path, mode="rb", **options):
        read_before = type(self)

        class Reader(io.BufferedReader):
            def read(self, size=-1, /):
                read_before.reads += 1
                if read_before.failures and read_before.reads % read_before.every == 0:
                    read_before.failures -= 1
                    raise ConnectionError("network is unreachable")
                return super().read(min(size, 4096) if size > 0 else size)

        return Reader(io.FileIO(path))


def test_a_network_that_is_gone_for_a_while_costs_no_row(folder, processor, monkeypatch, caplog):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(read, "WAITS", (0, 0, 0, 0))
    monkeypatch.setattr(Flaky, "failures", 3)
    there = [contents(b) for b in islice(stream(declared(f"flaky://{folder}"), processor), 10)]
    assert there == [contents(b) for b in islice(stream(declared(folder), processor), 10)]
    assert Flaky.failures == 0 and "trying again" in caplog.text
    monkeypatch.setattr(Flaky, "failures", 10**6)
    monkeypatch.setattr(Flaky, "every", 1)
    with pytest.raises(
        DataError, match=r"flaky://\S+ cannot be read at row \d+ \(ConnectionError: network is unreachable\)"
    ):
        list(islice(stream(declared(f"flaky://{folder}"), processor), 10))


def test_settings_that_shards_cannot_have_are_refused(folder):
    with pytest.raises(ConfigError, match="rows is missing: shards of tar and jsonl do not say"):
        Mixture(declared(folder, rows=None))
    with pytest.raises(ConfigError, match="limit takes the first rows by number"):
        Mixture({"datasets": [{"dataset": declared(folder), "limit": 3}]})
    with pytest.raises(ConfigError, match="shuffle_buffer belongs to shards"):
        load_mixture({"format": "llava", "path": "x.json", "shuffle_buffer": 3})
    with pytest.raises(UnavailableError, match=r"gs:// needs gcsfs; .*pip install gcsfs"):
        Mixture(declared("gs://bucket"))
    with pytest.raises(ConfigError, match="nosuch"):
        Mixture(declared("nosuch://bucket"))


def test_a_check_names_what_training_would_replace(folder, tmp_path):
    twice = tar([*members(0)[:1], *members(0), *members(1), ("s002.json", b"{")])
    (tmp_path / "a.tar").write_bytes(twice)
    spec = load_mixture(declared("", path=str(tmp_path / "a.tar"), rows=5)).datasets[0].dataset
    report = check(spec, progress=False)
    reasons = [problem.reason for problem in report.problems]
    assert len(reasons) == 4 and "two members" in reasons[0] and "not valid JSON" in reasons[1]
    assert "hold 3 rows, and rows says 5" in reasons[3]
    with pytest.raises(ConfigError, match="no number that a quarantine list could leave out"):
        check(spec, progress=False, write=True)
    with pytest.raises(ConfigError, match="shards need a declaration"):
        load_mixture(f"{folder}/{PATTERN}.tar")


def test_names_with_braces():
    assert expand_braces("a-{08..11}.{tar,tgz}")[:3] == ["a-08.tar", "a-08.tgz", "a-09.tar"]
    assert len(expand_braces("{000000..000127}")) == 128
    with pytest.raises(ConfigError, match="counts down"):
        expand_braces("{3..1}")
    assert is_sharded("s3://b/x.parquet") and is_sharded("x-{0..3}.jsonl") and is_sharded("a.tar")
    assert not is_sharded("${DATA}/x.json") and not is_sharded("x/*.parquet") and not is_sharded(None)
