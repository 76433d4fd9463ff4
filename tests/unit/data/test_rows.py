"""Does every odd row become what it means, or is it named, counted and replaced while training goes on?"""

from __future__ import annotations

import base64
import copy
import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from mllm.data.check import check
from mllm.data.collate import Batch, Dropped
from mllm.data.dataset import BadShare, DataStream, DropLog
from mllm.data.mixture import Mixture
from mllm.data.plan import make_plan
from mllm.data.recognise import recognise
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.processing.chat import encode_sample
from mllm.types import IMAGE_MARK
from tests.helpers import picture
from tests.unit.data.test_collate_and_dataset import processor  # noqa: F401  (fixture)

CASES = Path(__file__).resolve().parents[2] / "golden" / "rows"
TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}]


def among_good(tmp_path: Path, case: str | dict, *, good: int = 63) -> Path:
    """A file of so many good rows with one other row, number 7, among them."""
    shutil.copy(CASES / "a.png", tmp_path / "a.png")
    row = json.loads((CASES / case).read_text()) if isinstance(case, str) else case
    if "conversations" in row:
        talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
        rows = [{"id": f"g{i}", "image": "a.png", "conversations": talk} for i in range(good)]
    else:
        rows = [{"id": f"g{i}", "images": ["a.png"], "messages": TURNS} for i in range(good)]
    rows.insert(7, row)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def spec(path: Path, **options) -> DatasetSpec:
    text = path.read_text()
    return DatasetSpec(name="d", format="llava" if '"conversations"' in text else "messages", path=str(path), **options)


def stream(spec: DatasetSpec, processor, *, total=64, encode=None, **options):  # noqa: F811
    log = DropLog()
    plan = make_plan(Mixture({"datasets": [{"dataset": spec}]}), batch_size=8, total=total)
    encode = encode or partial(encode_sample, processor, max_length=256)
    return log, DataStream(plan, encode, pad_token_id=0, on_drop=log, **options)


BAD = {
    "image_key_misnamed.jsonl": r"1 <image> placeholder and no image.*keys id, img_path, conversations.*image_key: img_path",
    "messages_no_images.jsonl": r"1 <image> placeholder and no image.*keys id, image_path, messages.*image_key: image_path",
    "lone_surrogate.jsonl": r"the assistant's turn holds half of a surrogate pair \('\\ud83d', character 4\)",
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_the_check_and_replaced_in_training(tmp_path, processor, case):  # noqa: F811
    declared = spec(among_good(tmp_path, case))
    with pytest.raises((AlignmentError, DataError), match=BAD[case]):
        open_source(declared)[7]
    report = check(declared, progress=False, write=False)
    assert [problem.row for problem in report.problems] == [7] and report.checked == 64
    log, batches = stream(declared, processor)
    found = list(batches)
    assert sum(len(batch.ids) for batch in found) == 64 and log.counts == {"d": 1}
    dropped = [item for batch in found for item in batch.dropped]
    assert [item.row for item in dropped] == [7] and dropped[0].reason == report.problems[0].reason


@pytest.mark.parametrize("case", ["nul_char.jsonl", "special_in_user.jsonl", "special_in_answer.jsonl"])
def test_odd_text_is_text(tmp_path, processor, case):  # noqa: F811
    declared = spec(among_good(tmp_path, case))
    assert check(declared, processor, progress=False, write=False).num_bad == 0
    log, batches = stream(declared, processor)
    assert sorted(i for batch in batches for i in batch.ids) == sorted(["7", *(f"g{i}" for i in range(63))])
    assert not log.counts


@pytest.mark.parametrize("talk", ["messages", "conversations"])
def test_a_row_with_two_keys_of_other_pictures_is_refused_and_one_of_the_same_is_read(talk, tmp_path):
    said = (
        TURNS if talk == "messages" else [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
    )
    row = {"id": "two", talk: said, "image": "a.png", "images": ["b.png"]}
    path = among_good(tmp_path, row, good=0)
    with pytest.raises(
        DataError, match=r"two.*'image' and 'images' both hold something, and not the same.*image_key: image"
    ):
        open_source(spec(path))[0]
    assert open_source(spec(path, image_key="images"))[0].images == [str(tmp_path / "b.png")]
    path = among_good(tmp_path, {**row, "images": ["a.png"]}, good=0)
    assert open_source(spec(path))[0].images == [str(tmp_path / "a.png")]
    with pytest.raises(DataError, match="'video' and 'videos' both hold something"):
        open_source(spec(among_good(tmp_path, {**row, "images": [], "video": "a.mp4", "videos": ["b.mp4"]}, good=0)))[0]


def test_the_key_can_be_named_and_typed_marks_allowed(tmp_path):
    path = among_good(tmp_path, "image_key_misnamed.jsonl", good=0)
    sample = open_source(spec(path, image_key="img_path"))[0]
    assert sample.images == [str(tmp_path / "a.png")] and IMAGE_MARK in sample.turns[0].content
    typed = open_source(spec(path, typed_images=True))[0]
    assert typed.images == [] and typed.turns[0].content.startswith("<image>")
    with pytest.raises(ValueError, match="image_key belongs to the formats llava"):
        DatasetSpec(name="d", format="routing_labels", path="x", image_key="a")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": [], "messages": TURNS}, "1 <image> placeholder and no image"),
        ({"images": None, "image": float("nan"), "messages": TURNS}, "1 <image> placeholder and no image"),
        ({"pictures": ["b.png"], "messages": [{"role": "user", "content": "What?"}, TURNS[1]]}, "pictures looks like"),
        (
            {"videos": ["a.mp4"], "images": ["a.png"], "messages": TURNS},
            "0 <video> and 1 <image> placeholders of the user for 1 v",
        ),
        ({"audio": "a.wav", "images": ["a.png"], "messages": TURNS}, "has audio, which training does not read"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": "<image>"}], "photo_path": "x"}, "2 <image> placeholders"),
    ],
)
def test_no_row_is_learned_without_what_it_shows(tmp_path, change, expected):
    with pytest.raises((AlignmentError, DataError), match=expected):
        open_source(spec(among_good(tmp_path, change, good=0)))[0]


def test_text_rows_with_harmless_keys_stay(tmp_path):
    row = {"image_id": 7, "image_url": "", "source": "https://example.org/a.png", "image": None}
    row["messages"] = [{"role": "user", "content": "What?"}, TURNS[1]]
    assert open_source(spec(among_good(tmp_path, row, good=0)))[0].images == []


def test_a_mark_in_a_question_column_is_the_images_place(tmp_path, processor):  # noqa: F811
    file = CASES / "question_column_with_image_mark.parquet"
    columns = {"question": "question", "answer": "answer", "image": "image"}
    declared = DatasetSpec(name="d", format="columns", path=str(file), columns=columns)
    sample = open_source(declared)[0]
    assert sample.turns[0].content == f"{IMAGE_MARK}\nWhat colour?" and len(sample.images) == 1
    _, batches = stream(declared, processor, total=8)
    batch = next(iter(batches))
    text = processor.tokenizer.decode(batch.inputs["input_ids"][0])
    assert "< image>" not in text and text.count("<image>") == processor.rules.layout().num_tokens
    typed = open_source(declared.model_copy(update={"typed_images": True}))[0]
    assert typed.turns[0].content == f"{IMAGE_MARK}\n<image>\nWhat colour?"
    twice = declared.model_copy(update={"prompt": "<image> {question}"})
    with pytest.raises(AlignmentError, match="2 <image> placeholders in the prompt and 1 images"):
        open_source(twice)[0]
    blind = declared.model_copy(update={"columns": declared.columns.model_copy(update={"image": None})})
    with pytest.raises(
        AlignmentError, match=r"no image; pictures are read from no column, .*keys question, answer, image"
    ):
        open_source(blind)[0]


def test_whatever_encoding_raises_is_the_samples(tmp_path, processor):  # noqa: F811
    declared = spec(among_good(tmp_path, {"id": "odd", "images": ["a.png"], "messages": TURNS}))

    def encode(sample):
        if sample.id == "odd":
            raise TypeError("TextInputSequence must be str")
        return encode_sample(processor, sample, 256)

    log, batches = stream(declared, processor, encode=encode)
    found = list(batches)
    dropped = [item for batch in found for item in batch.dropped]
    assert [item.reason for item in dropped] == ["d, sample 'odd' (row 7): TypeError: TextInputSequence must be str"]
    assert sum(len(batch.ids) for batch in found) == 64 and log.kinds == {"d": {"cannot be encoded": 1}}


def test_a_template_that_refuses_one_conversation_ends_no_run(tmp_path, processor):  # noqa: F811
    two = [{"role": "user", "content": "And?"}, {**TURNS[0], "content": "<image>What?"}, TURNS[1]]
    declared = spec(among_good(tmp_path, {"id": "twice", "images": ["a.png"], "messages": two}))
    strict = copy.copy(processor)
    strict.chat_template = (
        "{%- for m in messages -%}{%- if loop.previtem is defined and loop.previtem.role == m.role -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}{%- endfor -%}" + processor.chat_template
    )
    _, batches = stream(declared, strict)
    dropped = [item for batch in batches for item in batch.dropped]
    assert len(dropped) == 1 and dropped[0].row == 7
    assert "sample 'twice'" in dropped[0].reason and "must alternate" in dropped[0].reason
    assert [p.kind for p in check(declared, strict, progress=False).problems] == ["not encodable"]


def test_too_many_bad_samples_end_the_run_with_counts_and_cure(tmp_path, processor):  # noqa: F811
    declared = spec(among_good(tmp_path, "lone_surrogate.jsonl"))

    def encode(sample):
        if int(sample.id[1:] or 0) % 4 == 0:
            raise ValueError("no")
        return encode_sample(processor, sample, 256)

    batches = list(stream(declared, processor, encode=encode, total=640)[1])
    assert sum(len(batch.ids) for batch in batches) == 640
    share = BadShare(0.05)
    with pytest.raises(
        DataError, match=r"^d: \d+ of the \d+ samples tried so far .* max_bad_share 0\.05 .* The last: .*--write-quar"
    ):
        for batch in batches:
            share.add(share.count([batch], ["d"]))
    share = BadShare(0.5)
    share.add(share.count(batches, ["d"]))


def test_the_share_of_bad_samples_is_of_all_processes_together(tmp_path, processor):  # noqa: F811
    """What one process meets by chance ends no run; what all meet together does, on every process alike."""

    def dropped(number: int) -> list[Dropped]:
        return [Dropped("d", row, str(row), f"row {row}", "cannot be read") for row in range(number)]

    def step(good: int, bad: int) -> Batch:
        ids = [str(k) for k in range(good)]
        return Batch({}, ids, ["d"] * good, [], torch.zeros(0), 0, dropped=dropped(bad))

    both = BadShare(0.05), BadShare(0.05)

    def together(one: Batch, other: Batch) -> None:
        counts = both[0].count([one], ["d"]), both[1].count([other], ["d"])
        for share in both:
            share.add({key: counts[0][key] + counts[1][key] for key in counts[0]})

    together(step(150, 12), step(150, 0))  # 8 % of one process's, 4 % of all
    counts = both[0].count([step(0, 9)], ["d"]), both[1].count([step(0, 0)], ["d"])
    total = {key: counts[0][key] + counts[1][key] for key in counts[0]}
    for share, told in zip(both, ("The last: row 8", "Other processes met them")):
        with pytest.raises(DataError, match=rf"^d: 21 of the 321 samples .* allows\. {told}"):
            share.add(total)


# ---------------------------------------------------------------------------------------------------------------- cells


def test_conversations_as_text_nan_and_numpy_in_cells_are_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    shutil.copy(CASES / "a.png", tmp_path / "a.png")
    talk = json.dumps(TURNS)
    frame = pandas.DataFrame(
        {
            "talk": [talk, json.dumps([{**TURNS[0], "content": "What?"}, TURNS[1]]), "[broken"],
            "pics": [["a.png"], None, ["a.png"]],
            "system": ["be kind", float("nan"), None],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    columns = {"messages": "talk", "images": "pics", "system": "system"}
    data = open_source(DatasetSpec(name="t", format="columns", path=str(tmp_path / "t.parquet"), columns=columns))
    assert [turn.role for turn in data[0].turns] == ["system", "user", "assistant"]
    assert data[0].images == [str(tmp_path / "a.png")]
    assert [turn.role for turn in data[1].turns] == ["user", "assistant"] and data[1].images == []
    with pytest.raises(DataError, match="text that looks like JSON and is none"):
        data[2]
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"image": "a.png", "conversations": talk}) + "\n")
    assert open_source(DatasetSpec(name="t", format="llava", path=str(text)))[0].images == [str(tmp_path / "a.png")]


def test_an_empty_cell_is_never_shown_or_learned(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"q": ["a", "b", "c"], "hint": ["x", None, "y"], "a": ["1", "2", float("nan")]}).to_parquet(
        tmp_path / "t.parquet"
    )
    declared = DatasetSpec(
        name="t", format="columns", path=str(tmp_path / "t.parquet"), columns={"question": "q", "answer": "a"},
        prompt="{q} {hint}",
    )  # fmt: skip
    data = open_source(declared)
    assert data[0].turns[0].content == "a x"
    with pytest.raises(DataError, match="hint is empty, and the prompt shows it"):
        data[1]
    with pytest.raises(DataError, match="a is empty"):
        data[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": ["c?", "d?"], "answer": ["red", "x"]}, r"row 0\): question holds a list"),
        ({"question": {"text": "c?"}, "answer": "red"}, r"question holds an object \(\{'text'"),
        ({"question": "c?", "answers": [{"answer": "red", "confidence": "yes"}]}, "answers holds an object"),
        ({"question": "c?", "answer": "red", "system": ["a", "b"]}, "system holds a list"),
    ],
)
def test_a_cell_is_not_learned_as_python_writes_it(row, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        open_source(recognise(tmp_path / "t.jsonl"))[0]


def test_numpy_cells_and_roles_of_hub_sets_are_read():
    import numpy as np

    from mllm.data.cells import as_list, plain_cell
    from mllm.data.conversations import message_turns

    cell = np.array(
        [{"user": "What?", "assistant": "It.", "source": "x"}, {"user": "And?", "assistant": "No."}], object
    )
    turns, images = message_turns(plain_cell(cell), ["a.png", "b.png"], where="s")
    assert [(t.role, t.content) for t in turns][:2] == [
        ("user", f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhat?"),
        ("assistant", "It."),
    ]
    assert len(turns) == 4 and images == ["a.png", "b.png"]
    named = [{"role": "_user", "content": "<image>"}, {"role": "ASSISTANT", "content": "b"}]
    assert [turn.role for turn in message_turns(named, ["a.png"], where="s")[0]] == ["user", "assistant"]
    assert as_list(np.array(["a.png", None], object)) == ["a.png"] and as_list(float("nan")) == []
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert as_list(pixels)[0] is pixels and plain_cell(np.float64("nan")) is None and plain_cell(np.int64(3)) == 3


def test_a_table_of_pictures_declared_without_any_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"pic": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
    )
    table = datasets.Dataset.from_list([{"pic": picture(1), "q": "what?", "a": "it"}], features=features)
    table.to_parquet(str(tmp_path / "t.parquet"))
    options = {"name": "t", "format": "columns", "path": str(tmp_path / "t.parquet")}
    with pytest.raises(
        ConfigError, match=r"column 'pic' holds pictures and columns names no image.*columns.image: pic"
    ):
        open_source(DatasetSpec(**options, columns={"question": "q", "answer": "a"}))
    assert (
        open_source(DatasetSpec(**options, columns={"question": "q", "answer": "a"}, typed_images=True))[0].images == []
    )


# ------------------------------------------------------------------------------------------------------------ references


def test_check_training_and_evaluation_read_a_pictures_reference_alike(tmp_path, processor):  # noqa: F811
    from mllm.eval.data.pictures import picture as evaluated

    encoded = (CASES / "a.png").read_bytes()
    buffer = io.BytesIO()
    picture(3, size=(64, 48)).save(buffer, "JPEG")
    (tmp_path / "my picture.png").write_bytes(encoded)
    (tmp_path / "100%25.png").write_bytes(encoded)
    references = {
        "base64": base64.b64encode(encoded).decode(),
        "base64 jpeg": base64.b64encode(buffer.getvalue()).decode(),
        "data": "data:image/png;base64," + base64.b64encode(encoded).decode(),
        "uri": f"file://{tmp_path}/my%20picture.png",
        "short uri": f"file:{tmp_path}/my%20picture.png",
        "local uri": f"file://localhost{tmp_path}/my%20picture.png",
        "literal": f"file://{tmp_path}/100%25.png",
        "path": "my picture.png",
        "entry": {"bytes": None, "path": "my picture.png"},
        "text bytes": {"bytes": base64.b64encode(encoded).decode(), "path": None},
    }
    rows = [{"id": name, "images": [entry], "messages": TURNS} for name, entry in references.items()]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = spec(path)
    assert [problem.reason for problem in check(declared, progress=False, write=False).problems] == []
    log, batches = stream(declared, processor, total=len(rows))
    assert {i for batch in batches for i in batch.ids} == set(references) and not log.counts
    assert open_source(declared)[3].images == [str(tmp_path / "my picture.png")]
    for entry in references.values():
        found = evaluated(entry, tmp_path)
        assert not found.missing() and found.load()[0].size in ((20, 20), (64, 48))


def test_a_reference_that_cannot_be_read_is_the_same_fault_for_check_and_training(tmp_path, processor):  # noqa: F811
    broken = base64.b64encode((CASES / "a.png").read_bytes()).decode()[:-9]
    faults = {
        "gone": ("gone.png", "missing image", "no such image file"),
        "long": ("x" * 5000, "corrupt image", "cannot be read"),
        "cut": (broken, "corrupt image", "base64 of a picture is damaged"),
        "other": ("file://elsewhere/a.png", "unreadable", "a file of another machine"),
        "remote": ("https://example.org/a.png", "missing image", "is remote"),
        "codes": ("none/codes.json#0", "missing image", "holds no stored codes"),
    }
    rows = [{"id": name, "images": [entry], "messages": TURNS} for name, (entry, _, _) in faults.items()]
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [{**TURNS[0], "content": "?"}, TURNS[1]]}])
    )
    report = check(spec(path), progress=False, write=False)
    assert {problem.id if problem.kind != "unreadable" else "other": problem.kind for problem in report.problems} == {
        name: kind for name, (_, kind, _) in faults.items()
    }
    _, batches = stream(spec(path), processor, total=7)
    reasons = {item.row: item.reason for batch in batches for item in batch.dropped}
    for row, (name, (_, _, said)) in enumerate(faults.items()):
        assert said in report.problems[row].reason and name in report.problems[row].reason
        assert row in reasons and (said in reasons[row] or name == "codes")


def test_stored_codes_are_a_picture_for_the_check_too(tmp_path):
    from mllm.processing.images import load_image
    from mllm.visual_tokenizers.base import build_tokenizer
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.recipe import ImagesSpec
    from mllm.visual_tokenizers.storage import encode_images
    from tests.unit.visual_tokenizers.tokenizer_configs import TINY

    images = load_images(ImagesSpec(type="digits_and_charts", options={"charts": 3, "digits": False}), 16, "train")
    encode_images(build_tokenizer(TINY["vq"]), images, tmp_path / "codes")
    drawn = [{"role": "user", "content": "Draw it."}, {"role": "assistant", "content": "<image>"}]
    rows = [{"id": str(k), "images": [f"codes/codes.json#{k}"], "messages": drawn} for k in (0, 2, 3)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = check(spec(path), progress=False, write=False).problems
    assert [problem.row for problem in problems] == [2] and "there is no number 3" in problems[0].reason
    with pytest.raises(DataError, match="names stored codes where pixels are needed"):
        load_image(f"{tmp_path}/codes/codes.json#0", where="s")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("reasoning_content.jsonl", "leaves the assistant's thoughts out"),
        ("call_with_text.jsonl", "has no tools"),
        ("call_with_empty_content.jsonl", "has no tools"),
    ],
)
def test_thoughts_and_calls_that_the_template_lacks_are_named_and_replaced(tmp_path, processor, case, reason):  # noqa: F811
    declared = spec(among_good(tmp_path, case))
    report = check(declared, processor, progress=False, write=False)
    assert [problem.row for problem in report.problems] == [7] and reason in report.problems[0].reason
    log, batches = stream(declared, processor)
    assert sum(len(batch.ids) for batch in batches) == 64 and log.counts == {"d": 1}


def test_a_call_is_read_as_openai_writes_it(tmp_path):
    sample = open_source(spec(among_good(tmp_path, "call_with_empty_content.jsonl", good=0)))[0]
    turn = sample.turns[1]
    assert turn.content == "" and turn.calls[0]["function"] == {"name": "zoom", "arguments": {"box": [0, 0, 5, 5]}}
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": turn.calls},
        {"role": "tool", "content": [{"type": "text", "text": "five"}], "tool_call_id": "1"},
        {"role": "assistant", "content": "Five.", "reasoning_content": "It said so."},
    ]
    row = {"messages": talk, "tools": json.dumps([{"type": "function", "function": {"name": "zoom"}}])}
    sample = open_source(spec(among_good(tmp_path, row, good=0)))[0]
    assert [t.role for t in sample.turns] == ["user", "assistant", "tool", "assistant"]
    assert sample.turns[2].content == "five" and sample.turns[3].thoughts == "It said so."
    assert sample.meta["tools"][0]["function"]["name"] == "zoom"
    for change, message in (
        ({"content": None}, "no content and no tool call"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments of f are no JSON"),
        ({"content": "", "function_call": {"name": "f"}}, "function_call is OpenAI's old form"),
    ):
        row = {"messages": [talk[0], {"role": "assistant", **change}]}
        with pytest.raises(DataError, match=message):
            open_source(spec(among_good(tmp_path, row, good=0)))[0]
