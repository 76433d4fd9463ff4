"""Are the usual hub copies of each benchmark (parquet, pictures as bytes) read right, and scored as worked out by hand?"""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

import pytest

from mllm.errors import DataError
from mllm.eval.data.loading import load_data
from mllm.eval.task import load_task
from tests.unit.eval.test_official_files import parquet, png, prompt_of, run, write

IMAGE = {"bytes": png(), "path": "a.png"}
TEN = ["cat"] * 2 + ["dog"] * 8
PEOPLE = [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(TEN, 1)]
QA = {"question": "What is it?", "image": IMAGE}
CHOICES = QA | {"A": "sun", "B": "moon", "C": "nan", "D": "nan", "category": "ocr", "source": "s", "split": "dev"}
MATH = QA | {"image": "images/1.jpg", "decoded_image": IMAGE, "unit": "", "query": "q",
             "metadata": {"task": "geometry", "source": "s", "skills": ["x"]}}  # fmt: skip
SCIENCE = QA | {"choices": ["no", "yes"], "hint": "Look.", "task": "closed choice", "grade": "grade2", "topic": "physics",
                "subject": "natural science", "lecture": "", "solution": ""}  # fmt: skip
SPACE = {"dataset": "scannet", "scene_name": "s1", "question": "How many?"}

# task, hub source, file below the folder, rows, reply (or a rule on the row's id), the headline worked out by hand
COPIES: dict[str, tuple[str, str, str, list[dict[str, Any]], Any, float]] = {
    # two of ten people said cat: 0.6; eight said dog: 1
    "vqav2": ("vqav2", "hub (lmms-lab)", "data/validation-00000-of-00068.parquet",
              [QA | {"question_id": k, "image_id": 1, "question_type": "what is", "answer_type": "other",
                     "multiple_choice_answer": "dog", "answers": PEOPLE} for k in (1, 2)],
              lambda key: "a cat" if key == "1" else "dog.", 80.0),
    "textvqa": ("textvqa", "hub (lmms-lab)", "data/validation-00000-of-00003.parquet",
                [QA | {"image_id": "x", "question_id": 1, "answers": TEN, "ocr_tokens": ["a"], "image_classes": ["b"]}],
                "Cat,", 60.0),
    "vizwiz": ("vizwiz", "hub (lmms-lab)", "data/val-00000-of-00005.parquet",
               [QA | {"question_id": "VizWiz_val_0.jpg", "answers": TEN, "category": "other"}], "dog", 100.0),
    # two of ten letters differ: 0.8; x shares nothing: 0
    "docvqa": ("docvqa", "hub (lmms-lab)", "DocVQA/validation-00000-of-00006.parquet",
               [QA | {"questionId": str(k), "question_types": ["form"], "docId": 4, "ucsf_document_id": "f",
                      "ucsf_document_page_no": "1", "data_split": "val", "answers": ["abcdefghij"]} for k in (1, 2)],
               lambda key: "ABCDEFGHxx" if key == "1" else "x", 40.0),
    "infovqa": ("infovqa", "hub (lmms-lab)", "InfographicVQA/validation-00000-of-00005.parquet",
                [QA | {"questionId": "7", "answers": ["42%"], "answer_type": ["single span"], "image_url": "u",
                       "operation/reasoning": ["counting"], "ocr": "", "data_split": "val"}], "42", 200 / 3),
    "chartqa": ("chartqa", "hub (lmms-lab)", "data/test-00000-of-00001.parquet",
                [QA | {"type": kind, "answer": answer} for kind, answer in
                 (("human_test", "100"), ("augmented_test", "2010"), ("augmented_test", "Ann"))], "104", 100 / 3),
    "plotqa": ("plotqa", "parquet", "data/test-00000-of-00009.parquet",
               [QA | {"answer": answer, "template": "data_retrieval"} for answer in ("10.0", "11.0")], "10.4", 50.0),
    "charxiv": ("charxiv", "hub (princeton-nlp)", "data/validation-00000.parquet",
                [{"reasoning_q": "How much?", "reasoning_a": "0.5", "reasoning_a_type": 3, "reasoning_q_source": 1,
                  "category": "cs", "image": IMAGE, "num_subplots": 1}], "0.50", 100.0),
    "ai2d": ("ai2d", "hub (lmms-lab)", "data/test-00000-of-00002.parquet",
             [QA | {"options": ["x", "y", "z", "w"], "answer": answer} for answer in ("1", "3")], "B", 50.0),
    "scienceqa": ("scienceqa", "hub (lmms-lab)", "ScienceQA-FULL/test-00000-of-00001.parquet",
                  [SCIENCE | {"answer": 1}, SCIENCE | {"answer": 0, "image": None}], "B.", 50.0),
    "scienceqa-derek": ("scienceqa", "hub (derek-thomas)", "data/test-00000-of-00001-x.parquet",
                        [SCIENCE | {"answer": 1}, SCIENCE | {"answer": 0, "image": None}], "B.", 50.0),
    "scienceqa_img": ("scienceqa_img", "hub (lmms-lab)", "ScienceQA-IMG/test-00000-of-00001.parquet",
                      [SCIENCE | {"answer": 1}], "B", 100.0),
    "scienceqa_img-derek": ("scienceqa_img", "hub (derek-thomas)", "data/test-00000-of-00001-x.parquet",
                            [SCIENCE | {"answer": 1}, SCIENCE | {"answer": 1, "image": None}], "B", 100.0),
    # question 1 right in both orders, question 2 in one of its two: half
    "mmbench": ("mmbench", "hub (lmms-lab)", "en/dev-00000-of-00001.parquet",
                [CHOICES | {"index": index, "answer": "B", "hint": "nan", "L2-category": "coarse", "comment": "nan"}
                 for index in (1, 1000001, 2, 1000002)], lambda key: "A" if key == "1000002" else "B", 50.0),
    "seed": ("seed", "hub (lmms-lab)", "data/test-00000-of-00057.parquet",
             [QA | {"image": [IMAGE], "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "C",
                    "data_id": "x", "data_type": kind, "question_id": str(k), "question_type_id": 1, "segment": None}
              for k, kind in enumerate(("image", "image", "video"))], lambda key: "C" if key == "0" else "D", 50.0),
    # F1 of one category: precision 1/2, recall 1
    "pope": ("pope", "hub (lmms-lab)", "data/test-00000-of-00003.parquet",
             [QA | {"id": str(k), "question_id": str(k), "answer": answer, "image_source": "COCO_val2014_1",
                    "category": "random"} for k, answer in ((1, "yes"), (2, "no"))], "Yes", 200 / 3),
    # one picture with both right: acc 100 + acc+ 100; one with one right: 50 + 0, another category
    "mme": ("mme", "hub (lmms-lab)", "data/test-00000-of-00002.parquet",
            [QA | {"question_id": f"{category}/0.png", "category": category, "answer": answer,
                   "question": f"Is it a {answer}? Please answer yes or no."}
             for category, answer in (("existence", "Yes"), ("existence", "No"), ("count", "No"), ("count", "Yes"))],
            lambda key: "Yes" if key.endswith(("#0", "#2", "#3")) else "No", 250.0),
    "ocrbench": ("ocrbench", "hub (echo840)", "data/test-00000-of-00001.parquet",
                 [QA | {"dataset": "IIIT5K", "question_type": "Regular Text Recognition", "answer": [answer]}
                  for answer in ("STOP", "go")], "it says stop", 500.0),
    "mathvista": ("mathvista", "hub (AI4Math)", "data/testmini-00000-of-00001.parquet",
                  [MATH | {"pid": "1", "choices": ["dog", "cat"], "precision": None, "answer": "cat",
                           "question_type": "multi_choice", "answer_type": "text"},
                   MATH | {"pid": "2", "choices": None, "precision": 1.0, "answer": "1.2",
                           "question_type": "free_form", "answer_type": "float"}],
                  lambda key: "(B)" if key == "1" else "1.3", 50.0),
    # a count: 4 of 5 has mean relative accuracy 0.6; a choice: right
    "vsibench": ("vsibench", "hub (nyu-visionx)", "test-00000-of-00001.parquet",
                 [SPACE | {"id": 0, "question_type": "object_counting", "options": None, "ground_truth": "5"},
                  SPACE | {"id": 1, "question_type": "route_planning", "options": ["A. l", "B. r"], "ground_truth": "B"}],
                 lambda key: "4" if key == "0" else "B", 80.0),
    # 2D is the mean of ADE20K (1) and COCO (0); 3D is 1: 0.75
    "cv_bench-2d-3d": ("cv_bench", "parquet", "test_2d.parquet",
                       [{"idx": 0, "type": "2D", "task": "Count", "source": "ADE20K", "image": IMAGE, "question": "?",
                         "prompt": "How many? (A) 1 (B) 2", "choices": ["1", "2"], "answer": "(A)", "filename": "f"}],
                       "(A)", 100.0),
    "cv_bench": ("cv_bench", "hub (nyu-visionx)", "data/test-00000.parquet",
                 [{"idx": k, "type": kind, "task": "Count", "source": source, "image": IMAGE, "question": "How many?",
                   "prompt": "How many? (A) 1 (B) 2", "choices": ["1", "2"], "answer": answer, "filename": "f"}
                  for k, (kind, source, answer) in enumerate((("2D", "ADE20K", "(A)"), ("2D", "COCO", "(B)"),
                                                              ("3D", "Omni3D", "(A)")))], "(A)", 75.0),
    # three of four: the third question's template asks for a tick, the fourth's for the layout and has no place
    "charxiv_descriptive": ("charxiv_descriptive", "hub (princeton-nlp)", "data/validation-00000-of-00001.parquet",
                            [{"image": IMAGE, "figure_path": "images/3.jpg", "subplot_loc": None, "subplot_row": 1, "subplot_col": 2,
                              "reasoning_q": "?", "reasoning_a": "?"} |
                             {f"descriptive_{kind}{k}": value for kind, values in (("q", (1, 4, 6, 18)), ("a", ("Sun", "0", "2", "1 by 2")))
                              for k, value in enumerate(values, 1)}],
                            lambda key: {"0": "Sun", "1": "0", "2": "3", "3": "1 by 2"}[key[-1]], 75.0),
    # two questions to one picture and one to another: two of three are counted right
    "tallyqa": ("tallyqa", "hub (vikhyatk)", "data/test-00000-of-00019.parquet",
                [{"image": IMAGE, "qa": [{"question": "How many?", "answer": answer, "is_simple": simple, "data_source": "amt"}
                                         for answer, simple in answers]} for answers in (((2, True), (3, False)), ((2, True),))],
                "two", 200 / 3),
    "evochart": ("evochart", "hub (gsarch)", "data/train-00000-of-00001.parquet",
                 [QA | {"answer": "100", "is_clear": clear, "attribute": "value", "chart_type": "bar"} for clear in (True, False)],
                 "104", 50.0),
    "sat": ("sat", "hub (nv-njb)", "data/test-00000-of-00001.parquet",
            [{"question": "Did it turn?", "answers": ["left", "right"], "correct_answer_idx": place, "image_bytes": [IMAGE, IMAGE]}
             for place in (0, 1)], "B", 50.0),
}  # fmt: skip


@pytest.mark.parametrize("copy", COPIES)
def test_a_hub_copy_is_read_and_scored(copy: str, tmp_path: Path):
    task, source, file, rows, reply, headline = COPIES[copy]
    folder = tmp_path / "d"
    several = any(isinstance(row.get(name), list) for row in rows for name in ("image", "image_bytes"))
    images = () if several else tuple(name for name in ("image", "decoded_image") if _is_picture(rows[0].get(name)))
    parquet(folder / file, rows, images)
    if file == "test_2d.parquet":  # the other half, all right as well
        other = [row | {"type": "3D", "source": "Omni3D"} for row in rows]
        parquet(folder / "test_3d.parquet", other, images)
    for k in range(3):
        frame = folder / f"scannet/s1.mp4/{k}.png"
        frame.parent.mkdir(parents=True, exist_ok=True)
        frame.write_bytes(png(k))
    rule = (lambda request: reply(request.id)) if callable(reply) else reply
    result = run(task, folder, rule, tmp_path)
    assert result.header["source"] == source and result.problems == []
    assert result.metrics[0].value == pytest.approx(headline)
    item = load_data(load_task(task), data={task: folder}).items[0]
    assert item.question and item.pictures and prompt_of(item)


# task, file, columns, rows, reply (or a rule on the row's id), the headline worked out by hand
TABLES: dict[str, tuple[str, list[dict[str, Any]], Any, float]] = {
    # 'no' is the class looked for: both no are found, one yes is called no: F1 of precision 2/3 and recall 1
    "amber": ("AMBER.tsv", [{"category": category, "answer": answer, "image_path": "AMBER_1.jpg"} for category, answer in (
        ("discriminative-hallucination", "no"), ("discriminative-attribute-state", "no"), ("relation", "yes"))], "No", 80.0),
    # the pair: yes to what is true, no to what is false; the number 80 is not within 5 % of 70
    "chartbench": ("ChartBench.tsv", [
        {"index": index, "chart_type": "area", "task": task, "QA_type": kind, "answer": answer} for index, task, kind, answer in (
            ("7_0", "CR", "Acc+", "Yes"), ("7_1", "CR", "Acc+", "No"), ("9_0", "NQA", "GPT-acc", "70.0"))],
        lambda key: {"7_0": "Yes.", "7_1": "No.", "9_0": "80"}[key], 50.0),
    "chartx": ("ChartX.tsv", [
        {"category": category, "answer": answer, "metadata": '{"title": "t", "chart_type": "pie", "csv": "a"}'}
        for category, answer in (("QA", "12"), ("structure", "a"), ("QA", "30"), ("description", "d"))], "12", 50.0),
    "chartx_table": ("ChartX.tsv", [{"category": category, "answer": "year\\tsales\\n2019\\t4"} for category in ("structure", "QA")],
                     "year | sales\n2019 | 4", 100.0),
    "plotqa": ("PlotQA.tsv", [{"answer": answer} for answer in ("10.0", "11.0")], "10.4", 50.0),
    "tallyqa": ("tallyqa_data.tsv", [{"answer": answer} for answer in ("3", "4")], "There are three.", 50.0),
}  # fmt: skip


@pytest.mark.parametrize("task", TABLES)
def test_the_table_of_vlmevalkit_is_read_and_scored(task: str, tmp_path: Path):
    """The columns that its classes read; a picture stands once, later rows name the row that has it."""
    file, rows, reply, headline = TABLES[task]
    rows = [{"index": str(k), "question": "What is it?"} | row for k, row in enumerate(rows)]
    pictures = [base64.b64encode(png()).decode(), *[rows[0]["index"]] * (len(rows) - 1)]
    (tmp_path / "d").mkdir()
    with (tmp_path / "d" / file).open("w", newline="") as handle:
        table = csv.DictWriter(handle, [*rows[0], "image"], delimiter="\t")
        table.writeheader()
        table.writerows(row | {"image": image} for row, image in zip(rows, pictures))
    result = run(task, tmp_path / "d", (lambda request: reply(request.id)) if callable(reply) else reply, tmp_path)
    assert result.header["source"] == "tsv (VLMEvalKit)" and result.problems == []
    assert result.metrics[0].value == pytest.approx(headline)


def test_a_copy_with_other_fields_says_which_it_has(tmp_path: Path):
    parquet(
        tmp_path / "d/data/train-00000-of-00001.parquet",
        [QA | {"reply": "4", "is_clear": True, "chart_type": "bar", "attribute": "v"}],
        ("image",),
    )
    with pytest.raises(DataError, match=r"'answer' is undefined.*the row's fields: .*reply"):
        load_data(load_task("evochart"), data={"evochart": tmp_path / "d"})
    write(tmp_path / "o/EvoChart-QA.json", [{"ask": "?", "reply": "4", "picture": "1.png", "is_clear": True}])
    with pytest.raises(DataError, match=r"has no attribute 'query'; the row's fields: ask, reply, picture, is_clear"):
        load_data(load_task("evochart"), data={"evochart": tmp_path / "o"})
    parquet(tmp_path / "c/data/validation-00000-of-00001.parquet", [{"image": IMAGE, "descriptive_q1": 1}], ("image",))
    with pytest.raises(
        DataError,
        match="row 0 has no descriptive_q2, descriptive_q3, descriptive_q4; its fields: descriptive_q1, image",
    ):
        load_data(load_task("charxiv_descriptive"), data={"charxiv_descriptive": tmp_path / "c"})


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def test_both_halves_of_mmmus_lmms_lab_copy_are_scored(tmp_path: Path):
    row = {"question": "See <image 1>.", "options": "['a', 'b']", "answer": "B", "question_type": "multiple-choice",
           "explanation": "", "topic_difficulty": "Easy", "subfield": "x", "img_type": "['Diagrams']"}  # fmt: skip
    row |= {f"image_{k}": IMAGE if k == 1 else None for k in range(1, 8)}
    opened = row | {"id": "validation_Math_2", "question_type": "open", "answer": "12", "options": "[]"}
    rows = [row | {"id": "validation_Art_Theory_1"}, opened]
    parquet(tmp_path / "d/data/validation-00000-of-00001.parquet", rows, tuple(f"image_{k}" for k in range(1, 8)))
    result = run("mmmu", tmp_path / "d", lambda r: "(B)" if "Art" in r.id else "The answer is 13", tmp_path)
    assert result.header["source"] == "hub (lmms-lab)" and result.metrics[0].value == 50.0
    items = load_data(load_task("mmmu"), data={"mmmu": tmp_path / "d"}).items
    assert [item.category for item in items] == ["Art_Theory", "Math"] and items[0].num_images == 1


def test_mmbenchs_copy_gives_its_second_level_category(tmp_path: Path):
    _, _, file, rows, _, _ = COPIES["mmbench"]
    parquet(tmp_path / "d" / file, rows, ("image",))
    items = load_data(load_task("mmbench"), data={"mmbench": tmp_path / "d"}).items
    assert {item.meta["l2_category"] for item in items} == {"coarse"} and items[0].meta["options"] == ["sun", "moon"]


def frames(place: Path, count: int = 3) -> None:
    """A folder of frames where a video would be."""
    place.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (place / f"{k}.png").write_bytes(png(k))


def test_mvbenchs_hub_branch_of_cut_clips_is_read_without_bounds(tmp_path: Path):
    task = load_task("mvbench")
    hub = next(source for source in task.sources if source.name == "hub (OpenGVLab, branch video)")
    assert len(hub.files) == 20
    for file in hub.files:
        rows = [{"video": f"{k}_1.5_9.0.mp4", "question": "What?", "candidates": ["x", "y", "z"], "answer": "y",
                 "start": 1.5, "end": 9.0} for k in range(2)]  # fmt: skip
        write(tmp_path / "d" / file.path, rows)
        for row in rows:
            frames(tmp_path / "d" / file.fields["place"] / row["video"])
    # in every task the first is right; the second is right in the three tasks that end in "count" or "order"
    result = run(
        "mvbench", tmp_path / "d",
        lambda r: "B" if r.id.endswith("/0") or "count/" in r.id or "order/" in r.id else "(C) z", tmp_path,
    )  # fmt: skip
    lenient, strict = result.metrics
    assert result.header["source"] == hub.name and result.problems == [] and result.num_samples == 40
    assert lenient.value == strict.value == pytest.approx(100 * 23 / 40)
    item = load_data(task, data={"mvbench": tmp_path / "d"}).items[0]
    assert item.pictures[0].start is None and item.pictures[0].count == 16 and item.target == "y"
    assert prompt_of(item).endswith(
        "Question: What?\nOption:\n(A) x\n(B) y\n(C) z\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_videommes_hub_copy_of_two_lengths(tmp_path: Path):
    common = {"video_id": "1", "domain": "d", "sub_category": "s", "task_type": "t", "question": "Which?", "url": "u",
              "options": ["A. x.", "B. y.", "C. z.", "D. w."]}  # fmt: skip
    rows = [common | {"question_id": f"00{k}-1", "videoID": name, "duration": duration, "answer": answer}
            for k, (name, duration, answer) in enumerate((("abc", "short", "B"), ("abc", "short", "C"), ("de", "long", "B"),
                                                          ("de", "long", "B")))]  # fmt: skip
    parquet(tmp_path / "d/videomme/test-00000-of-00001.parquet", rows)
    for name in ("abc", "de"):
        frames(tmp_path / f"d/data/{name}.mp4")
    result = run("videomme", tmp_path / "d", "The best answer is: B", tmp_path)
    official = result.metrics[0]
    assert result.header["source"] == "hub (lmms-lab)" and official.value == 75.0 and official.num_clusters == 2
    item = load_data(load_task("videomme"), data={"videomme": tmp_path / "d"}).items[0]
    assert item.category == "short" and item.num_images == 32
    assert prompt_of(item).endswith("Which?\nA. x.\nB. y.\nC. z.\nD. w.\nThe best answer is:")
