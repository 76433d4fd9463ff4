"""Are small files in each benchmark's official layout read right, and scored as worked out by hand?"""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import load_data
from mllm.eval.data.pictures import Frames
from mllm.eval.run import evaluate
from mllm.eval.task import expand_tasks, load_task
from mllm.processing.mask_files import encode_rle, read_mask
from mllm.types import IMAGE_MARK
from tests.unit.eval.rules import RuleGenerator, constant


def picture(path: Path, shade: int = 100, size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 0, 0)).save(path)
    return path


def png(shade: int = 5) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: object, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in data) if lines else json.dumps(data)  # type: ignore[union-attr]
    path.write_text(text, encoding="utf-8")


def parquet(path: Path, rows: list[dict], images: tuple[str, ...] = (), group: int = 2) -> None:
    """A file as hub datasets are stored: pictures as {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        columns[name] = pa.array(values, struct) if name in images else pa.array(values)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def run(task: str, folder: Path, reply, tmp: Path, **options):
    generator = RuleGenerator(reply if callable(reply) else constant(reply))
    return evaluate(generator, [task], tmp / "out", data={task: folder}, progress=False, **options)[task]


def prompt_of(item) -> str:
    return item.turns[-1].content


def test_chartqa_two_files_and_pictures(tmp_path):
    write(tmp_path / "d/test/test_human.json", [{"imgname": "1.png", "query": "How much?", "label": "100"}])
    write(
        tmp_path / "d/test/test_augmented.json",
        [
            {"imgname": "1.png", "query": "When?", "label": "2010"},
            {"imgname": "2.png", "query": "Who?", "label": "Ann"},
        ],
    )
    for name in "12":
        picture(tmp_path / f"d/test/png/{name}.png")
    result = run("chartqa", tmp_path / "d", lambda r: "2008" if "When" in r.turns[-1].content else "104", tmp_path)
    data = load_data(load_task("chartqa"), data={"chartqa": tmp_path / "d"})
    assert [item.id for item in data.items] == ["human/0", "augmented/0", "augmented/1"]
    assert prompt_of(data.items[0]) == f"{IMAGE_MARK}\nHow much?\nAnswer the question with a single word."
    pix, strict, stripped = (metric.value for metric in result.metrics)
    assert pix == stripped == pytest.approx(200 / 3)  # 104 of 100 and the year within 5 %
    assert strict == pytest.approx(100 / 3)  # the year is wrong
    assert result.metrics[0].details["human"] == 100.0 and result.metrics[0].num_clusters == 2
    assert result.disagreements["relaxed_pix2struct v1 | relaxed_strict v2"] == 1
    assert result.header["limited"] and result.problems == []


def test_chartqa_hub_copies_are_told_apart_by_their_columns(tmp_path):
    image = {"bytes": png(), "path": "a.png"}
    rows = [{"image": image, "query": "q", "label": ["7"], "human_or_machine": 1}] * 3
    parquet(tmp_path / "d/data/test-00000-of-00001.parquet", rows, ("image",))
    data = load_data(load_task("chartqa"), data={"chartqa": tmp_path / "d"})
    assert data.source == "hub (HuggingFaceM4)" and [i.category for i in data.items] == ["augmented"] * 3
    assert data.items[2].pictures[0].read() == png() and data.items[0].target == ["7"]


def test_vqav2_questions_joined_with_annotations(tmp_path):
    picture(tmp_path / "d/val2014/COCO_val2014_000000000042.jpg")
    write(
        tmp_path / "d/v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"image_id": 42, "question": "What?", "question_id": q} for q in (420, 421, 422)]},
    )
    people = [{"answer": "yes", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    mixed = [{"answer": "cat" if k < 2 else "dog", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
    common = {"image_id": 42, "question_type": "what", "multiple_choice_answer": "x"}
    write(
        tmp_path / "d/v2_mscoco_val2014_annotations.json",
        {
            "annotations": [
                {"question_id": 421, "answers": mixed, "answer_type": "other", **common},
                {"question_id": 420, "answers": people, "answer_type": "yes/no", **common},
            ]
        },
    )
    result = run("vqav2", tmp_path / "d", lambda r: "Yes" if "what" in r.id else "Cat", tmp_path)
    evalai, official = result.metrics
    # unanimous yes against Cat: 0; two of ten said cat: 0.6
    assert evalai.value == pytest.approx(30.0) and official.value == pytest.approx(30.0)
    assert evalai.details["answer_type/other"] == pytest.approx(60.0) and evalai.num_clusters == 1
    assert any("unusable row: 422" in problem for problem in result.problems), "a question without annotation is named"


def test_textvqa_official_and_hub(tmp_path):
    picture(tmp_path / "d/train_images/abc.jpg")
    row = {"question": "what BRAND?", "image_id": "abc", "question_id": 1, "answers": ["nokia"] * 10, "ocr_tokens": []}
    write(tmp_path / "d/TextVQA_0.5.1_val.json", {"data": [row], "dataset_type": "val"})
    result = run("textvqa", tmp_path / "d", "Nokia.", tmp_path)
    assert result.metrics[0].value == pytest.approx(100.0)
    item = load_data(load_task("textvqa"), data={"textvqa": tmp_path / "d"}).items[0]
    assert prompt_of(item).startswith(f"{IMAGE_MARK}\nWhat brand?\n")


def test_vizwiz(tmp_path):
    picture(tmp_path / "d/val/VizWiz_1.jpg")
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    write(
        tmp_path / "d/val.json",
        [{"image": "VizWiz_1.jpg", "question": "?", "answers": answers, "answer_type": "unanswerable"}],
    )
    assert run("vizwiz", tmp_path / "d", "Unanswerable", tmp_path).metrics[0].value == pytest.approx(100.0)


def test_gqa_official_and_two_hub_configs_joined(tmp_path):
    picture(tmp_path / "d/images/n1.jpg")
    types = {"structural": "verify", "semantic": "attr", "detailed": "x"}
    write(
        tmp_path / "d/testdev_balanced_questions.json",
        {"07": {"imageId": "n1", "question": "Is it?", "answer": "yes", "types": types}},
    )
    result = run("gqa", tmp_path / "d", "Yes.", tmp_path)
    assert result.metrics[0].value == 100.0
    row = {"id": "07", "imageId": "n1", "question": "Is it?", "answer": "no", "types": types}
    parquet(tmp_path / "h/testdev_balanced_instructions/testdev-00000.parquet", [row])
    parquet(
        tmp_path / "h/testdev_balanced_images/testdev-00000.parquet",
        [{"id": "n1", "image": {"bytes": png(), "path": "n1.jpg"}}],
        ("image",),
    )
    data = load_data(load_task("gqa"), data={"gqa": tmp_path / "h"})
    assert data.items[0].id == "07" and data.items[0].pictures[0].read() == png() and data.items[0].category == "verify"


def test_docvqa_and_infovqa(tmp_path):
    picture(tmp_path / "d/documents/x_1.png")
    row = {"questionId": 9, "question": "Date?", "image": "documents/x_1.png", "docId": 3, "answers": ["1 May",
           "May 1"],
           "question_types": ["form"], "ucsf_document_id": "x"}  # fmt: skip
    write(tmp_path / "d/val_v1.0_withQT.json", {"dataset_name": "docvqa", "data": [row]})
    result = run("docvqa", tmp_path / "d", "may  1", tmp_path)
    assert [m.value for m in result.metrics] == [100.0, 100.0, 100.0]
    picture(tmp_path / "i/infographicsvqa_images/10.jpeg")
    row = {"questionId": 5, "question": "?", "image_local_name": "10.jpeg", "answers": ["42%"],
           "answer_type": ["single span"],
           "operation/reasoning": ["counting"], "evidence": ["text"]}  # fmt: skip
    write(tmp_path / "i/infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    result = run("infovqa", tmp_path / "i", "42", tmp_path)
    assert result.metrics[0].value == pytest.approx(100 * 2 / 3)


def test_pope_three_files_with_repeated_question_ids(tmp_path):
    for kind in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": k, "image": "a.jpg", "text": "Is there a dog?", "label": "yes" if k % 2 else "no"}
            for k in (1, 2)
        ]
        write(tmp_path / f"d/coco_pope_{kind}.json", rows, lines=True)
    picture(tmp_path / "d/val2014/a.jpg")
    result = run("pope", tmp_path / "d", "Yes, there is.", tmp_path)
    totals = result.metrics[0].details
    assert result.num_samples == 6 and totals["score"] == pytest.approx(200 / 3) and totals["yes_ratio"] == 100.0
    assert totals["accuracy"] == 50.0 and totals["random/precision"] == 50.0 and result.problems == []


def test_mme_both_folder_layouts(tmp_path):
    text = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    picture(tmp_path / "d/existence/000.jpg")
    (tmp_path / "d/existence/000.txt").write_text(text)
    picture(tmp_path / "d/OCR/images/0001.png")
    (tmp_path / "d/OCR/questions_answers_YN").mkdir()
    (tmp_path / "d/OCR/questions_answers_YN/0001.txt").write_text(text)
    result = run(
        "mme", tmp_path / "d", lambda r: "Yes" if "dog" in r.turns[-1].content or "OCR" in r.id else "no", tmp_path
    )
    totals = result.metrics[0].details
    assert totals["existence/score"] == 200.0 and totals["OCR/acc"] == 50.0 and totals["OCR/acc_plus"] == 0.0
    assert totals["perception"] == totals["score"] == 250.0
    item = load_data(load_task("mme"), data={"mme": tmp_path / "d"}).items[0]
    assert prompt_of(item).endswith("Is there a dog?\nAnswer the question using a single word or phrase.")
    assert len(load_data(load_task("mme"), data={"mme": tmp_path / "d"}, limit=2).items) == 2, (
        "a limit keeps pairs whole"
    )


def test_ai2d_official_masks_and_test_ids(tmp_path):
    questions = {
        "What is A?": {"abcLabel": True, "answerTexts": ["sun", "moon"], "correctAnswer": 1, "questionId": "0.png-0"},
        "Which?": {"abcLabel": False, "answerTexts": ["x", "y"], "correctAnswer": 0, "questionId": "0.png-1"},
    }
    write(tmp_path / "d/questions/0.png.json", {"imageName": "0.png", "questions": questions})
    write(tmp_path / "d/questions/1.png.json", {"imageName": "1.png", "questions": questions})
    (tmp_path / "d/ai2d_test_ids.csv").write_text("0\n")
    picture(tmp_path / "d/abc_images/0.png", 1)
    picture(tmp_path / "d/images/0.png", 2)
    result = run("ai2d", tmp_path / "d", "B", tmp_path)
    assert result.num_samples == 2 and result.metrics[0].value == 50.0
    items = load_data(load_task("ai2d"), data={"ai2d": tmp_path / "d"}).items
    assert [i.pictures[0].source.parent.name for i in items] == ["abc_images", "images"] and items[0].target == "B"


def test_scienceqa_with_and_without_pictures(tmp_path):
    row = {"question": "Q?", "choices": ["no", "yes"], "answer": 1, "hint": "Look.", "task": "closed choice",
           "grade": "grade2",
           "subject": "natural science", "topic": "physics", "split": "test"}  # fmt: skip
    problems = {
        "5": row | {"image": None, "hint": ""},
        "6": row | {"image": "image.png"},
        "7": row | {"split": "train", "image": None},
    }
    write(tmp_path / "d/problems.json", problems)
    picture(tmp_path / "d/test/6/image.png")
    result = run("scienceqa", tmp_path / "d", "The answer is B.", tmp_path)
    assert result.num_samples == 2 and [m.value for m in result.metrics] == [100.0, 100.0]
    text, seen = load_data(load_task("scienceqa"), data={"scienceqa": tmp_path / "d"}).items
    assert prompt_of(text).startswith("Q?\nA. no\nB. yes\n") and text.pictures == []
    assert prompt_of(seen).startswith(f"{IMAGE_MARK}\nContext: Look.\nQ?\n")
    assert run("scienceqa_img", tmp_path / "d", "B", tmp_path).num_samples == 1


def mmmu_row(name: str, **changes) -> dict:
    image = {"bytes": png(), "path": "1.png"}
    row = {"id": f"validation_{name}_1", "question": "See <image 1> and <image 2>.", "options": "['<image 2>', 'b']",
           "answer": "B", "question_type": "multiple-choice", "topic_difficulty": "Easy"}  # fmt: skip
    row |= {f"image_{k}": image if k < 3 else None for k in range(1, 8)}
    return row | changes


def test_mmmu_places_pictures_in_the_text(tmp_path):
    task = load_task("mmmu")
    names = task.sources[0].configs
    images = tuple(f"image_{k}" for k in range(1, 8))
    for name in names:
        rows = [mmmu_row(name)]
        if name == "Math":
            rows.append(
                mmmu_row(name, id="validation_Math_2", question="How many? <image 1>",
                         options="[]", answer="['12', 'twelve']",
                         question_type="open")
            )  # fmt: skip
        parquet(tmp_path / f"d/{name}/validation-00000-of-00001.parquet", rows, images)
    data = load_data(task, data={"mmmu": tmp_path / "d"})
    first = data.items[0]
    assert prompt_of(first) == (
        f"See {IMAGE_MARK} and {IMAGE_MARK}.\nA. image 2\nB. b\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert first.num_images == 2 and first.category == names[0] and first.meta["options"][1] == "b"
    opened = next(item for item in data.items if item.id == "validation_Math_2")
    assert opened.target == ["12", "twelve"] and prompt_of(opened).startswith(f"{IMAGE_MARK}\nHow many? {IMAGE_MARK}")
    result = run("mmmu", tmp_path / "d", lambda r: "It is 12" if "Math_2" in r.id else "hmm", tmp_path)
    mmmu = result.metrics[0]
    assert mmmu.value == pytest.approx(100 / 31) and mmmu.num_unparsed == 30 and mmmu.details["open"] == 100.0
    assert result.metrics[2].num_unparsed == 0 and result.metrics[2].label == "mmmu(random_fallback=42) v1"


def test_mmbench_tsv_with_picture_references(tmp_path):
    encoded = base64.b64encode(png(77)).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    rows = [
        ["1", "Which?", "", "x", "y", "", "", "B", "ocr", encoded, "coarse", "dev"],
        ["1000001", "Which?", "nan", "y", "x", "", "", "A", "ocr", "1", "coarse", "dev"],
        ["2", 'A "quoted"\tone?'.replace("\t", " "), "hint", "x", "y", "z", "", "C", "count", encoded, "fine", "dev"],
    ]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/mmbench_dev_en.tsv").write_text("\n".join("\t".join(row) for row in [head, *rows]))
    data = load_data(load_task("mmbench"), data={"mmbench": tmp_path / "d"})
    assert [len(item.meta["options"]) for item in data.items] == [2, 2, 3] and data.items[1].pictures[0].read() == png(
        77
    )
    assert [item.meta["group"] for item in data.items] == [1, 1, 2] and [i.meta["pass"] for i in data.items] == [
        0,
        1,
        0,
    ]
    result = run("mmbench", tmp_path / "d", lambda r: {"1": "B", "1000001": "B", "2": "C"}[r.id], tmp_path)
    circular, letters = result.metrics
    assert circular.value == 50.0 and circular.details["vanilla"] == 100.0 and letters.value == pytest.approx(200 / 3)
    assert circular.details["incomplete_groups"] == 1.0


def test_mmstar_tsv_and_hub(tmp_path):
    row = {"index": 0, "question": "Q?\nOptions: A: x, B: y", "image": {"bytes": png(), "path": "0.jpg"}, "answer": "B",
           "category": "math", "l2_category": "geometry", "meta_info": "m"}  # fmt: skip
    parquet(tmp_path / "h/data/val-00000.parquet", [row], ("image",))
    data = load_data(load_task("mmstar"), data={"mmstar": tmp_path / "h"})
    assert data.source == "hub (Lin-Chen)" and prompt_of(data.items[0]).count("\n") == 3
    assert run("mmstar", tmp_path / "h", "B", tmp_path).metrics[0].value == 100.0


def test_mmstar_tsv_lists_the_options_of_its_columns(tmp_path):
    encoded = base64.b64encode(png(77)).decode()
    head = ["index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "image"]
    rows = [
        ["0", "Which shape?", "round", "square", "flat", "none", "A", "coarse perception", "image style", encoded],
        ["1", "How many?", "1", "2", "", "nan", "B", "math", "geometry", encoded],
        ["2", "Where?", "left", "right", "up", "down", "C", "math", "geometry", encoded],
        ["3", "Who?", "he", "she", "they", "we", "C", "math", "geometry", encoded],
    ]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/MMStar.tsv").write_text("\n".join("\t".join(row) for row in [head, *rows]) + "\n")
    items = load_data(load_task("mmstar"), data={"mmstar": tmp_path / "d"}).items
    assert prompt_of(items[1]) == (
        f"{IMAGE_MARK}\nHow many?\nA. 1\nB. 2\nAnswer with the option's letter from the given choices directly."
    )
    assert items[0].pictures[0].read() == png(77) and items[0].meta["l2_category"] == "image style"
    # a letter, a letter and its text, an option's words (which the ranked reading does not know), the wrong letter
    replies = {"0": "A", "1": "B. 2", "2": "Up.", "3": "(D)"}
    result = run("mmstar", tmp_path / "d", lambda r: replies[r.id], tmp_path)
    letters, ranked = result.metrics
    assert result.header["source"] == "tsv" and result.problems == []
    assert letters.value == 75.0 and ranked.value == 50.0 and ranked.num_unparsed == 1


def test_seed_keeps_only_pictures(tmp_path):
    row = {"choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "C", "data_id": "x.jpg",
           "question": "?",
           "question_type_id": 1, "data_type": "image", "question_id": "101"}  # fmt: skip
    write(
        tmp_path / "d/SEED-Bench.json",
        {"questions": [row, row | {"data_type": "video", "question_id": "102"}], "question_type": {}},
    )
    picture(tmp_path / "d/SEED-Bench-image/x.jpg")
    result = run("seed", tmp_path / "d", "C", tmp_path)
    assert result.num_samples == 1 and result.metrics[0].value == 100.0


def test_ocrbench_json_and_tsv(tmp_path):
    row = {"dataset_name": "IIIT5K", "id": 0, "question": "what is written?", "answers": ["STOP"],
           "type": "Regular Text Recognition",
           "image_path": "a/b.png"}  # fmt: skip
    write(tmp_path / "d/OCRBench.json", [row, row | {"dataset_name": "HME100k", "answers": ["x ^ 2"]}])
    picture(tmp_path / "d/OCRBench_Images/a/b.png")
    result = run("ocrbench", tmp_path / "d", "it says stop", tmp_path)
    assert result.metrics[0].value == 500.0 and result.metrics[0].unit == "of 1000" and result.score == 0.5
    encoded = base64.b64encode(png()).decode()
    (tmp_path / "t").mkdir()
    (tmp_path / "t/OCRBench.tsv").write_text(
        f"index\timage\tquestion\tanswer\tcategory\n0\t{encoded}\t?\t\"['A', 'B']\"\tDoc-oriented VQA\n"
    )
    assert load_data(load_task("ocrbench"), data={"ocrbench": tmp_path / "t"}).items[0].target == ["A", "B"]


def test_chartqapro_conversation(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "Question": [["First?", "And then?"], ["True?"]], "Answer": [["5", "2010"], ["True"]], "image": [png(), png()],
        "Question Type": ["Conversational", "Fact Checking"], "Year": [["NO", "YES"], ["NO"]],
        "Paragraph": ["Some text.", ""],
    }  # fmt: skip
    (tmp_path / "d/data").mkdir(parents=True)
    pq.write_table(pa.table(rows), tmp_path / "d/data/test-00000.parquet")
    data = load_data(load_task("chartqapro"), data={"chartqapro": tmp_path / "d"})
    assert "Some text.\nQuestion: First?\nAnswer: 5\nQuestion: And then?\n" in prompt_of(data.items[0])
    assert prompt_of(data.items[1]).endswith("Answer with True or False only.")
    result = run("chartqapro", tmp_path / "d", lambda r: "2011" if "then" in r.turns[-1].content else "Truee", tmp_path)
    assert result.metrics[0].value == pytest.approx(40.0) and result.metrics[1].value == 0.0


def test_mathvista_prompt_and_score(tmp_path):
    common = {
        "unit": None,
        "metadata": {"task": "geometry", "source": "s"},
        "question": "How long?",
        "image": "images/1.jpg",
    }
    rows = {
        "1": {"pid": "1", "choices": ["dog", "cat"], "precision": None, "answer": "cat",
              "question_type": "multi_choice",
              "answer_type": "text", **common},
        "2": {"pid": "2", "choices": None, "precision": 1.0, "answer": "1.2", "question_type": "free_form",
              "answer_type": "float", **common, "unit": "cm"},
    }  # fmt: skip
    write(tmp_path / "d/testmini.json", rows)
    picture(tmp_path / "d/images/1.jpg")
    items = load_data(load_task("mathvista"), data={"mathvista": tmp_path / "d"}).items
    assert prompt_of(items[0]).endswith("Question: How long?\nChoices:\n(A) dog\n(B) cat")
    assert "one decimal place" in prompt_of(items[1]) and prompt_of(items[1]).endswith("How long? (Unit: cm)")
    result = run("mathvista", tmp_path / "d", lambda r: "(B)" if r.id == "1" else "The length is 1.22", tmp_path)
    assert result.metrics[0].value == 100.0


def test_vsibench_frames_from_a_folder_and_from_a_video(tmp_path):
    import av

    row = {"id": 0, "dataset": "scannet", "scene_name": "s1", "question_type": "object_counting",
           "question": "How many?",
           "options": None, "ground_truth": "5"}  # fmt: skip
    choice = row | {"id": 1, "question_type": "route_planning", "options": ["A. left", "B. right"], "ground_truth": "B"}
    write(tmp_path / "d/test.jsonl", [row, choice], lines=True)
    (tmp_path / "d/scannet").mkdir()
    with av.open(str(tmp_path / "d/scannet/s1.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width = stream.height = 32
        for shade in range(0, 200, 4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = load_data(load_task("vsibench"), data={"vsibench": tmp_path / "d"})
    assert data.items[0].num_images == 32 and prompt_of(data.items[0]).count(IMAGE_MARK) == 32
    assert "Options:\nA. left\nB. right\n" in prompt_of(data.items[1])
    shades = [np.asarray(image).mean() for image, _ in data.items[0].pictures[0].load()]
    assert len(shades) == 32 and shades == sorted(shades) and shades[0] < 12 and shades[-1] > 180
    result = run("vsibench", tmp_path / "d", lambda r: "4" if r.id == "0" else "B.", tmp_path)
    assert result.metrics[0].value == pytest.approx(80.0)  # (0.6 + 1) / 2


def test_frames_between_two_times(tmp_path):
    for k in range(12):
        picture(tmp_path / f"f/{k:03d}.png", shade=k * 10)
    frames = Frames(tmp_path / "f", 2, start=1.0, end=3.0, fps=3).load()
    assert [np.asarray(image)[0, 0, 0] for image, _ in frames] == [40, 70]  # frames 4 and 7 of 3 … 9


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for k in range(12):
        picture(tmp_path / f"f/{k}.png", shade=k * 10)
    frames = Frames(tmp_path / "f", 12).load()
    assert [np.asarray(image)[0, 0, 0] for image, _ in frames] == [k * 10 for k in range(12)]  # not 0, 1, 10, 11, 2 …


def test_cv_bench_jsonl_and_parquet(tmp_path):
    row = {"idx": 0, "type": "2D", "task": "Count", "source": "ADE20K", "prompt": "How many? (A) 1 (B) 2",
           "choices": ["1", "2"],
           "answer": "(B)", "filename": "img/a.png"}  # fmt: skip
    write(tmp_path / "d/test_2d.jsonl", [row], lines=True)
    write(tmp_path / "d/test_3d.jsonl", [row | {"type": "3D", "source": "Omni3D", "answer": "(A)"}], lines=True)
    picture(tmp_path / "d/img/a.png")
    result = run("cv_bench", tmp_path / "d", "(B)", tmp_path)
    assert result.metrics[0].value == 50.0 and result.metrics[0].details["2D"] == 100.0


def test_plotqa_and_charxiv(tmp_path):
    row = {
        "question_id": 3,
        "question_string": "Q?",
        "answer": 10.0,
        "image_index": 7,
        "template": "data_retrieval",
        "type": "dot",
    }
    write(tmp_path / "p/qa_pairs_V2.json", {"qa_pairs": [row]})
    picture(tmp_path / "p/png/7.png")
    assert run("plotqa", tmp_path / "p", "10.4", tmp_path).metrics[0].value == 100.0
    row = {"figure_id": 4, "query": "Q?", "answer": "0.5", "inst_category": 3}
    write(tmp_path / "c/data/reasoning_val.json", {"4": row})
    picture(tmp_path / "c/images/4.jpg")
    result = run("charxiv", tmp_path / "c", "0.50", tmp_path)
    assert result.metrics[0].value == 100.0 and "NOT the CharXiv score" in result.metrics[0].protocol


def test_refcoco_one_row_per_sentence_and_the_picture_gives_the_size(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "question_id": ["7"], "image": pa.array([{"bytes": png(), "path": "x"}], struct),
            "answer": [["left cup", "cup"]],
            "bbox": [[2.0, 1.0, 10.0, 5.0]], "file_name": ["f.jpg"],
        }
    )  # fmt: skip
    (tmp_path / "d/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "d/data/val-00000.parquet")
    result = run("refcoco_val", tmp_path / "d", "[0.1, 0.1, 0.6, 0.6]", tmp_path)  # 2 1 12 6 of 20 × 10 pixels
    assert (
        result.num_samples == 2
        and result.metrics[0].value == 100.0
        and result.metrics[0].details["iou"] == pytest.approx(100.0)
    )
    assert result.metrics[0].num_clusters == 1


@pytest.mark.parametrize("refs, task, split", [("unc", "refcoco_testa", "testA"), ("unc", "refcoco_plus_testb", "testB"),
                                               ("umd", "refcocog_val", "val")])  # fmt: skip
def test_refcoco_official_references_and_instances(refs, task, split, tmp_path):
    sentences = [{"sent": "left cup", "raw": "Left cup", "tokens": ["left", "cup"], "sent_id": k} for k in range(2)]
    reference = {"ref_id": 3, "ann_id": 11, "image_id": 5, "split": split, "category_id": 1, "sentences": sentences,
                 "sent_ids": [0, 1], "file_name": "COCO_train2014_000000000005_11.jpg"}  # fmt: skip
    folder = tmp_path / "d"
    write(folder / "instances.json", {"images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
                                      "annotations": [{"id": 11, "image_id": 5, "bbox": [2.0, 1.0, 10.0, 5.0]}]})  # fmt: skip
    (folder / f"refs({refs}).p").write_bytes(pickle.dumps([reference, reference | {"split": "train"}], protocol=0))
    picture(folder / "train2014/COCO_train2014_000000000005.jpg", size=(20, 10))
    # the box is 0.1 0.1 0.6 0.6; the other reply shares 4 of its 10 columns, and has 4 columns of its own: 4 / 14
    result = run(task, folder, lambda r: "[0.1, 0.1, 0.6, 0.6]" if r.id == "3#0" else "[0.4, 0.1, 0.8, 0.6]", tmp_path)
    assert result.num_samples == 2 and result.metrics[0].value == 50.0 and result.metrics[0].num_clusters == 1
    assert result.metrics[0].details["iou"] == pytest.approx(100 * (1 + 4 / 14) / 2) and result.problems == []


def masks_reply(left: int, top: int, right: int, bottom: int) -> str:
    mask = np.zeros((10, 20), bool)
    mask[top:bottom, left:right] = True
    return json.dumps({"text": "It is [SEG].", "masks": [encode_rle(mask)]})


def test_refcoco_masks_of_official_files_and_generators_that_give_none(tmp_path, monkeypatch):
    sentences = [{"sent": "left cup", "sent_id": k} for k in range(2)]
    reference = {"ref_id": 3, "ann_id": 11, "image_id": 5, "split": "testB", "sentences": sentences}
    folder = tmp_path / "d"
    square = [[2, 1, 12, 1, 12, 6, 2, 6]]  # 10 × 5 pixels by COCO's rule
    write(folder / "instances.json", {"images": [{"id": 5, "file_name": "a.jpg"}],
                                      "annotations": [{"id": 11, "bbox": [2, 1, 10, 5], "segmentation": square}]})  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps([reference, reference | {"split": "val"}], protocol=0))
    picture(folder / "train2014/a.jpg", size=(20, 10))
    with pytest.raises(ConfigError, match="refcoco_testb_seg: its answers are masks"):
        run("refcoco_testb_seg", folder, "a box", tmp_path / "none")
    assert "refcoco_testb_seg" in expand_tasks(["segmentation"]) and "refcoco_testb_seg" not in expand_tasks(["all"])
    monkeypatch.setattr(RuleGenerator, "gives_masks", True, raising=False)
    # the second shares 5 of 10 columns and has 5 of its own: 25 of 75
    reply = lambda r: masks_reply(2, 1, 12, 6) if r.id == "3#0" else masks_reply(7, 1, 17, 6)  # noqa: E731
    result = run("refcoco_testb_seg", folder, reply, tmp_path)
    assert result.num_samples == 2 and result.problems == []
    details = result.metrics[0].details
    assert result.metrics[0].value == pytest.approx(100 * 75 / 125, abs=1e-3)
    assert details["giou"] == pytest.approx(100 * (1 + 1 / 3) / 2, abs=1e-3)


def test_grefcoco_counts_sentences_that_name_several_things_or_none(tmp_path, monkeypatch):
    from mllm.data.lookup import load_dataset
    from mllm.data.refer import ANSWER_NOTHING, ReferSource

    folder = tmp_path / "d"
    square = lambda left: [[left, 1, left + 5, 1, left + 5, 6, left, 6]]  # noqa: E731  # 5 × 5 pixels by COCO's rule
    crowd = np.zeros((10, 20), bool)
    crowd[1:6, 14:19] = True
    annotations = [{"id": 11, "bbox": [2, 1, 5, 5], "segmentation": square(2)},
                   {"id": 12, "bbox": [8, 1, 5, 5], "segmentation": square(8)},
                   {"id": 13, "bbox": [14, 1, 5, 5], "segmentation": encode_rle(crowd)}]  # fmt: skip
    write(folder / "instances.json", {"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": annotations})
    named = {0: [11], 1: [11, 12], 2: [12, 13], 3: [-1], 4: [-1]}
    references = [{"ref_id": k, "ann_id": ids, "image_id": 5, "split": "val", "no_target": ids == [-1],
                   "sentences": [{"sent": "cups", "sent_id": k}]} for k, ids in named.items()]  # fmt: skip
    write(folder / "grefs(unc).json", [*references, references[1] | {"split": "testA"}])
    picture(folder / "train2014/a.jpg", size=(20, 10))
    monkeypatch.setattr(RuleGenerator, "gives_masks", True, raising=False)
    left = masks_reply(2, 1, 13, 6)  # 55 pixels, a column of 5 between two squares of 25
    found = {"1#0": left, "2#0": masks_reply(8, 1, 19, 6), "3#0": masks_reply(0, 0, 4, 4), "4#0": left}
    result = run("grefcoco_val_seg", folder, lambda r: found.get(r.id, "nothing"), tmp_path)
    assert result.num_samples == 5 and result.problems == []
    details = result.metrics[0].details
    # none marked of 25; 50 of 55 twice; no target: 16 pixels are taken for none, 55 are not
    assert details["giou"] == pytest.approx(100 * (0 + 2 * 50 / 55 + 1 + 0) / 5, abs=1e-3)
    assert details["ciou"] == pytest.approx(100 * 100 / (25 + 110), abs=1e-3)
    assert details["n_acc"] == 50.0 and details["t_acc"] == pytest.approx(200 / 3)
    assert "grefcoco_testb_seg" in expand_tasks(["segmentation"])
    spec = load_dataset("grefcoco_masks").model_copy(
        update={"path": str(folder / "grefs(unc).json"), "split": "val", "image_root": str(folder / "train2014")}
    )
    source = ReferSource(spec)
    assert source.sample(3).masks == [None] and source.sample(3).turns[1].content == ANSWER_NOTHING
    both = read_mask(source.sample(2).masks[0], (10, 20), where="two")
    assert both.sum() == 50 and both[3, 9] == both[3, 15] == 1 and both.max() == 1
    assert source.rows[2]["bbox"] == [8, 1, 11, 5] and source.rows[3]["bbox"] is None


def test_reasonseg_asks_the_first_sentence_and_leaves_ignored_pixels_out(tmp_path, monkeypatch):
    monkeypatch.setattr(RuleGenerator, "gives_masks", True, raising=False)
    folder = tmp_path / "d"
    corners = lambda left, right: [[left, 1], [right, 1], [right, 5], [left, 5]]  # noqa: E731
    shapes = [{"label": "target", "points": corners(2, 11)}, {"label": "ignore it", "points": corners(14, 16)}]
    for name, sentence in (("a", True), ("b", False)):
        texts = ["what holds tea", "another"]
        write(folder / f"val/{name}.json", {"text": texts, "is_sentence": sentence, "shapes": shapes})
        picture(folder / f"val/{name}.jpg", size=(20, 10))
    asked = {}

    def reply(request):
        asked[request.id] = request.turns[-1].content
        return masks_reply(2, 1, 17, 6) if request.id == "a" else "I see none."

    result = run("reasonseg", folder, reply, tmp_path)
    assert asked["a"].endswith("what holds tea Please output segmentation mask.")
    assert "What is what holds tea in this image?" in asked["b"]
    # columns 12, 13 and 14 … 16 are marked beside the target's 10; the last three do not count: 50 of 60, and 0 of 50
    assert result.metrics[0].details["giou"] == pytest.approx(100 * (50 / 60) / 2, abs=1e-3)
    assert result.metrics[0].value == pytest.approx(100 * 50 / 110, abs=1e-3)


def test_a_reference_file_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Path("x")]))
    write(tmp_path / "instances.json", {"images": [], "annotations": []})
    with pytest.raises(DataError, match="expected plain lists and mappings"):
        load_data(load_task("refcoco_val"), data={"refcoco_val": tmp_path})


def test_mvbench_twenty_files_with_bounds(tmp_path):
    task = load_task("mvbench")
    official = next(source for source in task.sources if source.name == "official")
    for file in official.files:
        kind = Path(file.path).stem
        row = {"video": "v", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
        if kind in ("action_sequence", "episodic_reasoning"):
            row |= {"start": 0.0, "end": 2.0}
        write(tmp_path / f"d/json/{kind}.json", [row])
    for place in {file.fields["place"] for file in official.files}:
        for k in range(4):
            picture(tmp_path / f"d/{place}v/{k}.png")
    data = load_data(task, data={"mvbench": tmp_path / "d"})
    assert len(data.items) == 20 and data.items[0].pictures[0].end == 2.0 and data.items[2].pictures[0].end is None
    only = [
        item.id for item in data.items if item.category != "action_sequence"
    ]  # a folder of frames there has no rate
    result = run("mvbench", tmp_path / "d", "(B) y", tmp_path, ids=only)
    assert result.metrics[0].value == 100.0 and result.metrics[0].num_scored == 19


def test_videomme_and_mmmu_pro_hub_copies(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"question_id": ["001-1"], "video_id": ["001"], "videoID": ["abc"], "duration": ["short"], "domain": ["d"],
           "sub_category": ["s"], "task_type": ["t"], "question": ["Q?"], "options": [["A. x", "B. y"]],
           "answer": ["B"]}  # fmt: skip
    (tmp_path / "v/videomme").mkdir(parents=True)
    pq.write_table(pa.table(row), tmp_path / "v/videomme/test-00000.parquet")
    for k in range(3):
        picture(tmp_path / f"v/data/abc.mp4/{k}.png")  # a folder of frames in the video's place
    assert run("videomme", tmp_path / "v", "B", tmp_path).metrics[0].value == 100.0
    pro = mmmu_row("Art", id="test_Art_1", subject="Art")
    parquet(tmp_path / "m/standard (10 options)/test-00000.parquet", [pro], tuple(f"image_{k}" for k in range(1, 8)))
    assert run("mmmu_pro", tmp_path / "m", "Answer: B", tmp_path).metrics[0].value == 100.0
    vision = {
        "id": "v1",
        "image": {"bytes": png(), "path": ""},
        "options": "['a', 'b']",
        "answer": "A",
        "subject": "Art",
    }
    parquet(tmp_path / "m/vision/test-00000.parquet", [vision], ("image",))
    assert run("mmmu_pro_vision", tmp_path / "m", "B", tmp_path).metrics[0].value == 0.0
