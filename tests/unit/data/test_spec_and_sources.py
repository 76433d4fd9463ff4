"""Do declarations say what is wrong with them, and do rows of every format become the right samples?"""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path

import pytest

import mllm.data.files
from mllm.data.files import JsonRows, matching_files
from mllm.data.lookup import load_dataset, load_mixture
from mllm.data.quarantine import read_quarantine
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError, UnknownName
from mllm.types import IMAGE_MARK
from tests.helpers import picture


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(tmp_path: Path, rows: list, format: str, **options):
    return open_source(
        DatasetSpec(name="d", format=format, path=str(write_jsonl(tmp_path / "d.jsonl", rows)), **options)
    )


def llava(value: str, image="a.png", answer="A cat.", **more) -> dict:
    row = {"id": "s1", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}
    return {**row, "image": image} if image is not None else row


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("chunk", [64, 1 << 24])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_a_json_list_are_found_whatever_the_layout(tmp_path, monkeypatch, chunk, ascii_only, indent):
    monkeypatch.setattr(mllm.data.files, "_CHUNK", chunk)
    rows = [{"id": i, "t": 'ä☃𝄞 "q" \\ ]}[{' * (i % 4), "n": [1, {"a": "]"}]} for i in range(40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    read = JsonRows(path)
    assert [read[i] for i in range(len(read))] == rows
    assert pickle.loads(pickle.dumps(read))[7] == rows[7]


def test_blank_lines_and_a_missing_last_newline_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": 1}\n\n  \r\n{"a": "ä"}'.encode())
    rows = JsonRows(path)
    assert len(rows) == 2 and rows[1] == {"a": "ä"}
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"b": 2}', '[{"a": 1}, {"b": }]', '[{"a": 1}, x]'])
def test_a_broken_json_list_names_file_byte_and_row(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"bad\.json, byte \d+, row [12]: not valid JSON"):
        JsonRows(path)


def test_a_broken_line_is_reported_only_when_read(tmp_path):
    rows = JsonRows(tmp_path / "x.jsonl") if (tmp_path / "x.jsonl").write_text('{"a": 1}\n{oops\n[1]\n') else None
    assert rows is not None and rows[0] == {"a": 1}
    with pytest.raises(DataError, match="row 1: not valid JSON"):
        rows[1]
    with pytest.raises(DataError, match="row 2: expected an object"):
        rows[2]


def test_folders_and_globs_mean_their_files_without_quarantine_lists(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a.jsonl.quarantine.jsonl", "a.jsonl.routing.jsonl", "c.txt"):
        write_jsonl(tmp_path / name, [{"a": 1}])
    assert [p.name for p in matching_files(tmp_path, (".jsonl",), where="d")] == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in matching_files(tmp_path / "*.jsonl", (".jsonl",), where="d")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"^d: no such file or folder"):
        matching_files(tmp_path / "none.jsonl", (".jsonl",), where="d")


# -------------------------------------------------------------------------------------------------------- conversations


def test_llava_placeholders_become_marks_and_paths_are_resolved(tmp_path):
    sample = source(tmp_path, [llava("<image>\nWhat is it?")], "llava")[0]
    assert sample.id == "s1" and sample.dataset == "d" and sample.images == [str(tmp_path / "a.png")]
    assert [t.role for t in sample.turns] == ["user", "assistant"]
    assert sample.turns[0].content == f"{IMAGE_MARK}\nWhat is it?"
    rooted = source(tmp_path, [llava("<image>")], "llava", image_root="/pictures")[0]
    assert rooted.images == ["/pictures/a.png"]


def test_a_typed_placeholder_without_an_image_stays_text(tmp_path):
    rows = [
        llava("How do I write <image> in HTML?", image=None),
        llava("<image>\nWhat does this say?", answer="It says <image>."),
        llava("plain", image=""),
    ]
    text_only, with_answer, empty = (source(tmp_path, rows, "llava", typed_images=True)[i] for i in range(3))
    assert text_only.images == [] and text_only.turns[0].content == "How do I write <image> in HTML?"
    assert with_answer.turns[0].content.count(IMAGE_MARK) == 1 and with_answer.turns[1].content == "It says <image>."
    assert empty.images == []


def test_a_mark_smuggled_into_text_is_taken_apart(tmp_path):
    sample = source(tmp_path, [llava(f"hello {IMAGE_MARK} there", image=None)], "llava")[0]
    assert IMAGE_MARK not in sample.turns[0].content and "\ufffc" not in sample.turns[0].content


def test_interleaved_answers_may_hold_the_marks(tmp_path):
    row = llava("Show two.", image=["a.png", "b.png"], answer="<image> and <image>")
    sample = source(tmp_path, [row], "llava")[0]
    assert sample.turns[1].content == f"{IMAGE_MARK} and {IMAGE_MARK}" and len(sample.images) == 2


@pytest.mark.parametrize(
    ("text", "image"), [("no mark", "a.png"), ("<image> <image>", "a.png"), ("<image>", ["a.png", "b.png"])]
)
def test_a_wrong_count_raises_with_both_numbers_and_the_sample(tmp_path, text, image):
    count, images = text.count("<image>"), 1 if isinstance(image, str) else 2
    with pytest.raises(AlignmentError, match=f"^d, sample 's1' .*{count} <image> placeholders .* and {images} images"):
        source(tmp_path, [llava(text, image=image)], "llava")[0]


def test_image_first_moves_marks_before_the_text(tmp_path):
    sample = source(tmp_path, [llava("What is it?\n<image>")], "llava", image_first=True)[0]
    assert sample.turns[0].content == f"{IMAGE_MARK}\nWhat is it?"


def test_sharegpt_variants_agree(tmp_path):
    rows = [
        {
            "conversations": [{"from": "user", "value": "<image>hi"}, {"from": "assistant", "value": "ho"}],
            "images": ["a.png"],
        },
        {
            "messages": [{"role": "user", "content": "<image>hi"}, {"role": "assistant", "content": "ho"}],
            "image": ["a.png"],
        },
        {
            "conversations": [
                {"from": "gpt", "value": "first"},
                {"from": "human", "value": "<image>hi"},
                {"from": "gpt", "value": "ho"},
            ],
            "image": "a.png",
        },
        {
            "system": "be kind",
            "conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "ho"}],
            "image": "a.png",
        },
    ]
    samples = [source(tmp_path, rows, "sharegpt")[i] for i in range(4)]
    for sample in samples:
        assert [(t.role, t.content) for t in sample.turns if t.role != "system"] == [
            ("user", f"{IMAGE_MARK}hi"),
            ("assistant", "ho"),
        ]
    assert samples[3].turns[0].role == "system" and samples[3].turns[0].content == "be kind"
    assert samples[0].id == "0" and samples[2].id == "2"


def test_message_parts_are_the_marks_and_typed_placeholders_stay(tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "text", "text": "Is <image> here? "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image", "image": "b.png"},
        {"type": "image"},
        {"type": "text", "text": "end"},
    ]
    row = {
        "id": 7,
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes <image>"}],
        "images": ["c.png"],
    }
    sample = source(tmp_path, [row], "messages")[0]
    assert sample.id == "7"
    assert sample.turns[0].content == f"Is <image> here? {IMAGE_MARK}{IMAGE_MARK}{IMAGE_MARK}end"
    assert sample.turns[1].content == "yes <image>"
    assert sample.images == [uri, str(tmp_path / "b.png"), str(tmp_path / "c.png")]


def test_string_messages_take_images_from_the_list(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
            "images": ["a.png"],
        },
        {"messages": [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "a tag"}]},
    ]
    data = source(tmp_path, rows, "messages", typed_images=True)
    assert data[0].turns[0].content == f"{IMAGE_MARK}a"
    assert data[1].turns[0].content == "what is <image>?" and data[1].images == []


def test_a_picture_beside_the_messages_is_taken_only_when_they_hold_none(tmp_path):
    answer = {"role": "assistant", "content": "b"}
    rows = [
        {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, answer]},
        {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "image"}]}, answer]},
        {"image": "a.png", "messages": [{"role": "user", "content": "<image>"}, answer]},
    ]
    data = source(tmp_path, rows, "messages")
    for index in range(3):
        assert data[index].images == [str(tmp_path / "a.png")] and data[index].turns[0].content == IMAGE_MARK


@pytest.mark.parametrize(
    ("messages", "images", "expected", "error"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], [], "more image parts", AlignmentError),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a"}]}],
            ["b"],
            "1 of 1 entries of images unused",
            AlignmentError,
        ),
        ([{"role": "user", "content": "hi"}], ["b"], "0 <image> placeholders", AlignmentError),
        ([{"role": "robot", "content": "hi"}], [], "unknown role 'robot'", DataError),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "'audio' is not supported", DataError),
        ([{"role": "user", "content": 3}], [], "content is int", DataError),
        ([{"role": "assistant", "content": None}], [], "no tool call", DataError),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], [], "weight is 0.5", DataError),
        ([], [], "conversation is empty", DataError),
        ("hello", [], "expected a list of turns", DataError),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, images, expected, error):
    with pytest.raises(error, match=rf"^d, sample 'q' \(row 0\): .*{expected}"):
        source(tmp_path, [{"id": "q", "messages": messages, "images": images}], "messages")[0]


def test_learn_is_read_from_every_common_key(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "learn": False},
        {"role": "assistant", "content": "c", "weight": 0},
        {"role": "assistant", "content": "d", "train": True},
        {"role": "assistant", "content": "e"},
    ]
    sample = source(tmp_path, [{"messages": turns}], "messages")[0]
    assert [t.learn for t in sample.turns] == [True, False, False, True, True]


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "query": datasets.Value("string"),
            "label": [datasets.Value("string")],
            "who": datasets.Value("string"),
        }
    )
    rows = [
        {"img": picture(i) if i != 2 else None, "query": f"q{i}?", "label": [f"a{i}", f"b{i}"], "who": "human"}
        for i in range(10)
    ]
    path = tmp_path_factory.mktemp("columns") / "data.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


COLUMNS = {"question": "query", "answer": "label", "image": "img", "meta": ["who"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_a_table_make_samples(parquet, streaming):
    from mllm.processing.images import load_image

    spec = DatasetSpec(
        name="t", format="columns", path=str(parquet), columns=COLUMNS, prompt="{query}\nIn short.",
        streaming=streaming, rows=10 if streaming else None,
    )  # fmt: skip
    data = open_source(spec)
    assert len(data) == 10
    sample = data[3]
    assert sample.turns[0].content == f"{IMAGE_MARK}\nq3?\nIn short." and sample.turns[1].content == "a3"
    assert sample.meta == {"who": "human", "answers": ["a3", "b3"]}
    assert (
        isinstance(sample.images[0], dict) and load_image(sample.images[0], where="t").tobytes() == picture(3).tobytes()
    )
    assert data[2].images == [] and data[2].turns[0].content == "q2?\nIn short."
    assert [data[i].turns[1].content for i in (9, 0, 5, 4)] == ["a9", "a0", "a5", "a4"]


def test_a_stream_shorter_than_declared_says_so(parquet):
    spec = DatasetSpec(name="t", format="columns", path=str(parquet), columns=COLUMNS, streaming=True, rows=50)
    with pytest.raises(DataError, match="no row 20, and rows declares 50"):
        open_source(spec)[20]


def test_a_wrong_column_is_named_with_the_right_ones(parquet):
    with pytest.raises(ConfigError, match="no column 'querry', did you mean 'query'"):
        open_source(
            DatasetSpec(name="t", format="columns", path=str(parquet), columns={**COLUMNS, "question": "querry"})
        )


def test_a_tables_fingerprint_is_its_content_wherever_it_lies(tmp_path, parquet):
    def fingerprint(path):
        return open_source(DatasetSpec(name="t", format="columns", path=str(path), columns=COLUMNS)).fingerprint

    copy = tmp_path / "other name.parquet"
    copy.write_bytes(parquet.read_bytes())
    assert fingerprint(copy) == fingerprint(parquet)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_parquet(str(parquet)).select(range(9)).to_parquet(str(copy))
    assert fingerprint(copy) != fingerprint(parquet)


def test_saved_datasets_and_csv_are_read(tmp_path, parquet):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(str(parquet))
    datasets.DatasetDict({"train": table, "val": table.select(range(3))}).save_to_disk(str(tmp_path / "saved"))
    spec = DatasetSpec(name="t", format="columns", path=str(tmp_path / "saved"), split="val", columns=COLUMNS)
    assert len(open_source(spec)) == 3
    with pytest.raises(ConfigError, match="no split 'test'; it has train, val"):
        open_source(spec.model_copy(update={"split": "test"}))
    (tmp_path / "t.csv").write_text("file,q,a\nx.png,what?,7\n")
    csv = DatasetSpec(
        name="c",
        format="columns",
        path=str(tmp_path / "t.csv"),
        columns={"question": "q", "answer": "a", "image": "file"},
    )
    sample = open_source(csv)[0]
    assert sample.images == [str(tmp_path / "x.png")] and sample.turns[1].content == "7"


# --------------------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"format": "lava", "path": "a"}, "format: unknown dataset format 'lava', did you mean 'llava'"),
        ({"format": "llava"}, "exactly one of path"),
        ({"format": "llava", "path": "a", "hub": "b"}, "exactly one of path"),
        ({"format": "llava", "path": "a", "revision": "x"}, "belong to a hub dataset"),
        ({"format": "llava", "hub": "a/b"}, "read by format columns"),
        ({"format": "columns", "path": "a"}, "needs columns"),
        ({"format": "messages", "path": "a", "columns": {"messages": "m"}}, "columns belongs to format columns"),
        ({"format": "messages", "path": "a", "streaming": True, "rows": 1}, "streaming is for format columns"),
        ({"format": "columns", "path": "a", "columns": {"messages": "m"}, "streaming": True}, "streaming needs rows"),
        ({"format": "columns", "path": "a", "columns": {"question": "q"}}, "belong together"),
        ({"format": "llava", "path": "a", "licens": "x"}, "licens: unknown key, did you mean 'licence'"),
    ],
)
def test_a_wrong_declaration_names_the_key_and_the_cure(data, expected):
    with pytest.raises(ConfigError, match=expected):
        load_mixture(data)


def test_mixtures_come_in_every_form_a_stage_may_hold(tmp_path):
    inline = {"format": "messages", "path": "x.jsonl"}
    assert load_mixture("demo").datasets[0].dataset.name == "demo_charts"  # type: ignore[union-attr]
    assert load_mixture("llava_558k").datasets[0].dataset.path.startswith("$MLLM_DATA")  # type: ignore[union-attr]
    assert [i.dataset.name for i in load_mixture(["demo_charts", {"dataset": inline, "repeat": 2}]).datasets] == [
        "demo_charts",
        "x",
    ]  # type: ignore[union-attr]
    assert load_mixture(inline).datasets[0].dataset.name == "x"  # type: ignore[union-attr]
    assert load_mixture({"datasets": [{"dataset": "demo_digits", "weight": 1}]}).datasets[0].weight == 1
    file = tmp_path / "mine.yaml"
    file.write_text("format: messages\npath: x.jsonl\n")
    assert load_mixture(str(file)).datasets[0].dataset.name == "mine"  # type: ignore[union-attr]
    assert load_dataset(str(file)).name == "mine"
    with pytest.raises(UnknownName, match="did you mean 'demo'"):
        load_mixture("deno")
    for wrong in ({"datasets": [{"dataset": "demo_charts", "weight": 1}, {"dataset": "demo_digits"}]}, {"x": 1}, 3, []):
        with pytest.raises(ConfigError):
            load_mixture(wrong)  # type: ignore[arg-type]


def test_missing_files_and_variables_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("MLLM_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"uses \$MLLM_DATA, which is not set; export MLLM_DATA="):
        open_source(load_dataset("llava_558k"))
    monkeypatch.setenv("MLLM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no such file.*It comes from: https://huggingface.co/datasets/liuhaotian"):
        open_source(load_dataset("llava_558k"))
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match="holds no rows"):
        open_source(DatasetSpec(name="e", format="messages", path=str(tmp_path / "e.jsonl")))


def test_a_quarantine_list_of_another_version_is_refused(tmp_path):
    data = source(tmp_path, [llava("a", image=None)] * 3, "llava")
    listed = data.quarantine_path()
    assert listed == tmp_path / "d.jsonl.quarantine.jsonl" and read_quarantine(data).rows == {}
    write_jsonl(listed, [{"fingerprint": data.fingerprint, "rows": 3}, {"row": 1, "id": "s1", "reason": "bad"}])
    assert read_quarantine(data).rows == {1: "bad"}
    write_jsonl(listed, [{"fingerprint": "other", "rows": 9}, {"row": 1, "reason": "bad"}])
    with pytest.raises(DataError, match="another version of d"):
        read_quarantine(data)
    listed.write_text("oops\n")
    with pytest.raises(DataError, match="line 1: not an entry"):
        read_quarantine(data)


def test_a_registered_format_keeps_its_datasets_names():
    from mllm.data.routing_labels import LabelledSource
    from mllm.data.sources import Source

    assert LabelledSource.name is Source.name, "what is dropped and counted is named by dataset, not by format"


def test_a_missing_shard_is_told_and_chosen_ones_are_not(tmp_path):
    for number in (0, 2, 3):
        (tmp_path / f"train-{number:05d}-of-00004.jsonl").write_text("{}")
    (tmp_path / "test-00000-of-00001.jsonl").write_text("{}")
    for path in (tmp_path, tmp_path / "train-*.jsonl"):
        with pytest.raises(
            DataError, match=r"d: .*train-00001-of-00004\.jsonl is missing between the 3 files found; fetch"
        ):
            matching_files(path, (".jsonl",), where="d")
    assert len(matching_files(tmp_path / "train-0000[02]-of-00004.jsonl", (".jsonl",), where="d")) == 2
    (tmp_path / "train-00001-of-00004.jsonl").write_text("{}")
    assert len(matching_files(tmp_path, (".jsonl",), where="d")) == 5
    for name in ("part-0000", "part-0001", "part-0003", "year-2019", "year-2021", "v1", "v3"):
        (tmp_path / f"{name}.json").write_text("[]")
    for path in (tmp_path, tmp_path / "part-*.json"):
        with pytest.raises(DataError, match=r"part-0002\.json is missing between the 3 files found.*by \? or \[ \]"):
            matching_files(path, (".json",), where="d")
    (tmp_path / "part-0002.json").write_text("[]")
    assert len(matching_files(tmp_path, (".json",), where="d")) == 8
