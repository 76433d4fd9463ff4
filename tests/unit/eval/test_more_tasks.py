"""Are small files of the later benchmarks, official and hub copies, read right and scored as worked out by hand?"""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mllm.errors import DataError
from mllm.eval.data.loading import load_data
from mllm.eval.data.templates import options_in, stem_of, table_text
from mllm.eval.harnesses.answer_files import export_answers, import_answers
from mllm.eval.predictions import read_predictions
from mllm.eval.task import load_task
from tests.unit.eval.test_official_files import parquet, picture, png, prompt_of, run, write

IMAGE = {"bytes": png(), "path": "a.png"}
CODED = base64.b64encode(png()).decode()
FOUR = {"A": "sun", "B": "moon", "C": "nan", "D": "nan"}


def table(path: Path, rows: list[dict[str, Any]], mark: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)


def hallusion(set_id: int, figure: int, question: int, answer: int) -> dict[str, Any]:
    return {"category": "VD", "subcategory": "map", "visual_input": "1", "set_id": str(set_id), "figure_id": str(figure),
            "question_id": str(question), "question": "Is it?", "gt_answer": str(answer), "gt_answer_details": "x",
            "filename": "./VD/map/1.png"}  # fmt: skip


def we_math(problem: int, key: str) -> dict[str, Any]:
    return {"ID": problem, "split": "testmini", "knowledge concept": "angles", "question": "How large?", "key": key,
            "option": "A.70°; B.40°; C.35°; D.20°", "answer": "B", "image_path": "i.png", "question number": 1}  # fmt: skip


# name → (task, source, {file: rows}, pictures that must exist, reply or rule on the id, headline, further totals by hand)
Layout = tuple[str, str, dict[str, list[dict[str, Any]]], list[str], Any, float, dict[str, float]]
LAYOUTS: dict[str, Layout] = {
    # the first pair has both right, the second one of two: half the pairs, three of four questions
    "mmvp": ("mmvp", "official", {"Questions.csv": [
        {"Index": k, "Question": "Is it open?", "Options": "(a) Open (b) Closed", "Correct Answer": answer}
        for k, answer in ((1, "(a)"), (2, "(b)"), (3, "(a)"), (4, "(b)"))]},
        [f"MMVP Images/{k}.jpg" for k in (1, 2, 3, 4)], lambda key: "B" if key == "2" else "(a) Open", 50.0,
        {"accuracy": 75.0, "groups": 2, "incomplete_groups": 0}),
    "realworldqa": ("realworldqa", "hub", {"data/test-00000-of-00002.parquet": [
        {"image": IMAGE, "question": "Which?\n\nA. left\nB. right\nAnswer with the letter.", "answer": "B"},
        {"image": IMAGE, "question": "How many? Answer with a word.", "answer": "Downhill"}]}, [],
        lambda key: "B. right" if key == "0" else "downhill.", 100.0, {}),
    "realworldqa-tsv": ("realworldqa", "tsv", {"RealWorldQA.tsv": [
        {"index": 0, "question": "Which?", **FOUR, "answer": "B", "image": CODED},
        {"index": 1, "question": "How many?", "A": "", "B": "", "C": "", "D": "", "answer": "3", "image": CODED}]}, [],
        "3", 50.0, {}),
    "vstar": ("vstar", "official", {"test_questions.jsonl": [
        {"image": "direct_attributes/1.jpg", "text": "What colour?\n(A) The colour is red.\n(B) The colour is blue.\nAnswer.",
         "category": category, "label": label, "question_id": k}
        for k, (category, label) in enumerate((("direct_attributes", "A"), ("relative_position", "B")))]},
        ["direct_attributes/1.jpg"], "(A) The colour is red.", 50.0, {"direct_attributes": 100.0, "macro": 50.0}),
    # group 0 all right; in group 1 the last of four is wrong: one question of four, one picture of four is not whole
    "naturalbench": ("naturalbench", "hub (BaiqiL, one row a question)", {"data/test-00000-of-00001.parquet": [
        {"Index": k, "Question": "Is it?", "Answer": "Yes" if k % 4 in (0, 3) else "No", "Image": IMAGE,
         "Question_Type": "yes_no", "Source": "x"} for k in range(8)]}, [],
        lambda key: "Yes, it is." if key in ("0", "3", "4") else "no", 50.0,
        {"question": 75.0, "image": 75.0, "accuracy": 87.5, "groups": 2}),
    # 3 of 4 questions; figure 0 has both right, figure 1 one of two; question 0 right on both figures, question 1 on one
    "hallusionbench": ("hallusionbench", "official", {"HallusionBench.json": [
        hallusion(0, figure, question, answer)
        for figure, question, answer in ((0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1))]},
        ["hallusion_bench/VD/map/1.png"], lambda key: "No" if key.endswith("_1") else "Yes.", 75.0,
        {"fAcc": 50.0, "qAcc": 50.0, "mean": 175 / 3}),
    # 'no' is looked for: said twice, right once of one: precision 1/2, recall 1, F1 2/3
    "amber": ("amber", "official", {"data/query/query_discriminative.json": [
        {"id": k, "image": "AMBER_1.jpg", "query": "Is there?"} for k in (1005, 1006, 1007)],
        "data/annotations.json": [{"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
                                  {"id": 1006, "type": "discriminative-attribute-state", "truth": "yes"},
                                  {"id": 1007, "type": "relation", "truth": "yes"}]},
        ["image/AMBER_1.jpg"], lambda key: "Yes" if key == "1006" else "No", 200 / 3,
        {"accuracy": 200 / 3, "precision": 50.0, "recall": 100.0, "relation/accuracy": 0.0, "average_accuracy": 200 / 3}),
    "countbench": ("countbench", "hub (vikhyatk)", {"data/test-00000-of-00001.parquet": [
        {"image": IMAGE, "text": "ten cats", "question": "How many cats?", "number": number} for number in (10, 9)]}, [],
        "There are ten cats.", 50.0, {"rmse": 0.5 ** 0.5}),
    "tallyqa": ("tallyqa", "official", {"test.json": [
        {"answer": 4, "data_source": "amt", "image": "VG_100K_2/1.jpg", "image_id": 1, "issimple": simple, "question_id": k,
         "question": "How many?"} for k, simple in ((1, True), (2, False))]}, ["VG_100K_2/1.jpg"],
        lambda key: "2 on the left and 2 on the right, so the answer is 4." if key == "1" else "3 or 4", 50.0,
        {"simple": 100.0, "complex": 0.0}),
    "mme_realworld": ("mme_realworld", "official", {"MME_RealWorld.json": [
        {"Question_id": str(k), "Image": "1.jpg", "Text": "What?", "Question Type": "Multiple Choice", "Task": part,
         "Answer choices": ["(A) sun", "(B) moon", "(C) sea", "(D) sky", "(E) not here"], "Ground truth": "B",
         "Category": "c", "Subtask": "OCR"} for k, part in ((1, "Perception"), (2, "Reasoning"))]}, ["1.jpg"],
        lambda key: "The answer is (B)" if key == "1" else "E", 50.0, {"Perception": 100.0, "Reasoning": 0.0}),
    "mme_realworld-hub": ("mme_realworld", "hub (yifanzhang114)", {"data/train-00000-of-00002.parquet": [
        {"index": "7", "bytes": CODED, "question": "What?", "multi-choice options": ["(A) sun", "(B) moon"], "answer": "A",
         "category": "perception/OCR with Complex Context", "l2-category": "text"}]}, [], "A", 100.0, {"Perception": 100.0}),
    "seed2_plus": ("seed2_plus", "official", {"SEED-Bench-2-plus-question.json": [{"questions": [
        {"question_id": "0", "question": "What?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4",
         "answer": "C", "data_id": "Map/1.png", "question_image_type": "map"}]}]},
        ["SEED-Bench-2-plus-image/Map/1.png"], "C", 100.0, {}),
    "mmt_bench": ("mmt_bench", "hub (lmms-lab)", {"data/val-00000-of-00002.parquet": [
        {"index": k, "question": "What?", "answer": "B", **FOUR, **dict.fromkeys("EFGHI"), "image": IMAGE,
         "category": "c", "l2-category": "ocr", "split": "VAL"} for k in (1, 2)]}, [],
        lambda key: "B" if key == "1" else "sun", 50.0, {}),
    "mathverse": ("mathverse", "official", {"testmini.json": [
        {"sample_index": str(k), "problem_index": "1", "problem_version": "Vision Only", "question": "", "image": "1.png",
         "answer": answer, "question_type": kind, "metadata": {"split": "testmini", "subject": "Plane Geometry"},
         "query_wo": "Find x.\nChoices:\nA:1\nB:2", "query_cot": "", "question_for_eval": text}
        for k, answer, kind, text in ((1, "B", "multi-choice", "Find x.\nChoices:\nA:1\nB:2"),
                                      (2, "2\\sqrt{3}", "free-form", "Find x."))]}, ["images/1.png"],
        lambda key: "So the answer is B." if key == "1" else "x = \\boxed{\\sqrt{12}}", 100.0, {}),
    "mathvision": ("mathvision", "hub (MathLLMs)", {"data/test-00000-of-00001.parquet": [
        {"id": str(k), "question": "How many?\n<image1>", "options": options, "image": "images/1.jpg",
         "decoded_image": IMAGE, "answer": answer, "solution": None, "level": 1, "subject": "counting"}
        for k, options, answer in ((1, ["1", "2"], "B"), (2, [], "\\frac{1}{2}"), (3, [], "7"))]}, [],
        lambda key: {"1": "\\boxed{2}", "2": "\\boxed{0.5}", "3": "\\boxed{8}"}[key], 200 / 3, {}),
    # problem 1 known and whole right; problem 2 one step unknown and whole right (rote); problem 3 all known, whole wrong (half)
    "wemath": ("wemath", "official", {"testmini.json": [
        we_math(problem, key) for problem in (1, 2, 3) for key in ("2steps_1", "2steps_2", "2steps_multi")]}, ["i.png"],
        lambda key: "A" if key in ("2/2steps_1", "3/2steps_multi") else "B", 50.0,
        {"loose": 250 / 3, "problems": 3, "IG": 100 / 3, "RM_strict": 100 / 3, "RM_loose": 0.0, "CM_loose": 200 / 3}),
    "chartmuseum": ("chartmuseum", "hub (lytang)", {"data/test-00000-of-00001.parquet": [
        {"image": IMAGE, "question": "How much?", "answer": answer, "reasoning_type": "visual", "source": "x", "hash": "h"}
        for answer in ("5", "Ann")]}, [], "<think>5 of 7</think><answer>5.1</answer>", 50.0, {}),
    "chartx": ("chartx", "official", {"ChartX_annotation_test.json": [
        {"chart_type": "bar_chart", "imgname": "bar_1", "img": "./bar_chart/png/1.png", "topic": "", "title": "", "csv": "",
         "QA": {"input": "How much?", "output": "100"}}]}, ["bar_chart/png/1.png"], "104", 100.0, {}),
    # two data points, one right: precision and recall one half
    "chartx_table": ("chartx_table", "official", {"ChartX_annotation_test.json": [
        {"chart_type": "bar_chart", "imgname": "bar_1", "img": "./bar_chart/png/1.png",
         "csv": "Year \\t Sales \\n 2001 \\t 10 \\n 2002 \\t 20", "QA": {"input": "", "output": ""}}]},
        ["bar_chart/png/1.png"], "Year | Sales\n2001 | 10\n2002 | 99", 50.0, {}),
    # a pair with both right and a number within 5 %, a pair with one right: two of three
    "chartbench": ("chartbench", "official", {"test.jsonl": [
        {"id": k, "image": "1.png", "type": {"chart": "bar", "image": "vertical_single", "task": "CR", "QA": kind},
         "conversation": asked}
        for k, kind, asked in ((1, "Acc+", [{"query": "True?", "label": "Yes"}, {"query": "False?", "label": "No"}]),
                               (2, "Acc+", [{"query": "True?", "label": "Yes"}, {"query": "Right?", "label": "No"}]),
                               (3, "NQA", [{"query": "How much?", "label": "100"}]))]}, ["1.png"],
        lambda key: "96" if key == "3/0" else "No" if key == "1/1" else "Yes, it is.", 200 / 3,
        {"acc_plus": 50.0, "nqa": 100.0, "confused": 50.0, "odd_pairs": 0}),
    "evochart": ("evochart", "official", {"EvoChart-QA.json": [
        {"imgname": "1.png", "query": "How much?", "label": "100", "is_clear": clear} for clear in (True, False)]}, ["1.png"],
        "101", 50.0, {}),
    "chartqa_human": ("chartqa_human", "hub (lmms-lab)", {"data/test-00000-of-00001.parquet": [
        {"image": IMAGE, "question": "q", "answer": "100", "type": kind} for kind in ("human_test", "augmented_test")]}, [],
        "104", 100.0, {}),
    "charxiv_descriptive": ("charxiv_descriptive", "official", {"data/descriptive_val.json": [
        {"figure_id": 3, "qids": [1, 19, 10, 2], "answers": ["Loss", "1", "4", "time"], "subplot_loc": [1, 2],
         "num_subplots": 2}]}, ["images/3.jpg"], "4", 25.0, {}),
    "mpdocvqa": ("mpdocvqa", "official", {"val.json": [{"data": [
        {"questionId": 1, "question": "Who?", "doc_id": "abc", "page_ids": ["abc_p0", "abc_p1"], "answers": ["abcdefghij"],
         "answer_page_idx": 1, "data_split": "val"}]}]}, ["images/abc_p0.jpg", "images/abc_p1.jpg"], "ABCDEFGHxx", 80.0, {}),
    # equal; not answerable and said so; a list of two of which one of one is found, over the longer list: 1/2
    "dude": ("dude", "official", {"2023-03-23_DUDE_gt_release_PUBLIC.json": [{"data": [
        {"questionId": k, "question": "Who?", "answers": answers, "answers_variants": [], "answer_type": kind, "docId": "d",
         "data_split": split}
        for k, answers, kind, split in (("1", ["Yes"], "abstractive", "val"), ("2", [], "not-answerable", "val"),
                                        ("3", ["Ann", "Bob"], "list/extractive", "val"), ("4", ["x"], "extractive", "train"))
        ]}]}, ["images/val/d_0.jpg", "images/val/d_1.jpg", "images/val/d_10.jpg", "images/val/d_2.jpg"],
        lambda key: {"1": "yes", "2": "None.", "3": "Bob"}[key], 250 / 3, {"list/extractive": 50.0}),
    # "5 percent" is 5; one of the two words in common: 2·1/(1+2)
    "slidevqa": ("slidevqa", "official", {"annotations/qa/test.jsonl": [
        {"deck_name": "deck", "qa_id": k, "question": "what is it?", "answer": answer, "evidence_pages": [1],
         "reasoning_type": "Single-hop", "answer_type": "Single-Span"} for k, answer in ((1, "5 percent"), (2, "5 blue"))]},
        ["images/test/deck/s-1.jpg", "images/test/deck/s-2.jpg"], "five", 250 / 3, {"em": 50.0}),
    "embspatial": ("embspatial", "official", {"embspatial_bench.json": [
        {"question_id": "mp3d_0", "question": "Where?", "image": CODED, "answer_options": ["left", "right"], "answer": 1,
         "relation": "left", "data_source": "mp3d", "objects": {}}]}, [], "B", 100.0, {}),
    # one question: all of base and flip right but the flipped one turned round
    "3dsrbench": ("3dsrbench", "official (circular)", {"3dsrbench_v1_vlmevalkit_circular.tsv": [
        {"index": k, "qid": qid, "question": "Higher?", **FOUR, "answer": "A", "category": "height_higher", "image": CODED}
        for k, qid in enumerate(("VIN6MS3J", "VIN6MS3J-1", "VIN6MS3J-flip", "VIN6MS3J-flip-1"))]}, [],
        lambda key: "B" if key == "VIN6MS3J-flip-1" else "A", 0.0, {"flip": 50.0, "circular": 50.0, "accuracy": 75.0}),
    "sat": ("sat", "official", {"SAT_test.parquet": [
        {"image_bytes": [IMAGE, IMAGE], "question": "Which way?", "answers": ["left", "right"], "question_type": "ego_movement",
         "correct_answer": "right"}]}, [], "B", 100.0, {}),
    # a choice; a depth of 4 for 5: 0.6; a move right as given and not turned: five axes of which one is 0 for 10
    "sparbench": ("sparbench", "hub (jasonzhango)", {"data/test-00000-of-00004.parquet": [
        {"id": str(k), "question": "?", "answer": answer, "image": [IMAGE], "task": task, "img_type": "x", "format_type": "y"}
        for k, answer, task in ((1, "B", "obj_spatial_relation_oo"), (2, "5", "depth_prediction_oc"),
                                (3, "move_right:2,rotate_left:10", "view_change_infer"))]}, [],
        lambda key: {"1": "B. left", "2": "about 4 m", "3": "move_right:2"}[key], 80.0,
        {"low": 60.0, "middle": 80.0, "high": 100.0}),
    "omnispatial": ("omnispatial", "official", {"data.json": [
        {"id": "0_0", "question": "?", "options": ["x", "y"], "answer": 1, "task_type": "Complex_Logic",
         "sub_task_type": "Geometric_Reasoning"}]}, ["Complex_Logic/0.png"], "B", 100.0, {}),
    # held; a count of 8 for 10: 0.8; two of three keys equal; boxes that overlap by a third; the answer held and its box half over
    "ocrbench_v2": ("ocrbench_v2", "official", {"OCRBench_v2.json": [
        {"id": k, "dataset_name": "d", "question": "?", "type": kind, "image_path": "1.png", "eval": way, "bbox": box,
         "answers": answers}
        for k, (kind, way, box, answers) in enumerate((
            ("cognition VQA en", "", [], ["STOP"]), ("text counting en", "regression", [], ["10"]),
            ("key information extraction en", "", [], ["{'name': ['Ann', 'Anna'], 'sum': '5', 'day': '1'}"]),
            ("text grounding en", "", [], ["0", "0", "100", "100"]),
            ("VQA with position en", "", [0, 0, 100, 100], ["exit"]), ("table parsing en", "", [], ["<table>"])))]}, ["1.png"],
        lambda key: {"0": "it says stop", "1": "about 8", "2": '{"name": "anna", "sum": "5", "day": "2"}', "3": "[50, 0, 150, 100]",
                     "4": "{'answer': 'the exit', 'bbox': [0, 0, 50, 100]}"}[key],
        20 * (1 + 0.8 + 2 / 3 + 1 / 3 + 0.75), {"en/calculation": 80.0, "en/relation extraction": 200 / 3}),
    # BLEU-1: 3 of 4 words of the reply; ROUGE-L: 2·3/(4+5)
    "mmfr": ("mmfr", "official", {"evaluation_sets/biggan/biggan_reasoning.json": [
        {"biggan/0_real/1.png": {"edges": "the edges are sharp here", "light": None},
         "biggan/1_fake/2.png": {"edges": "the edges are sharp here"}}]},
        ["evaluation_sets/biggan/0_real/1.png", "evaluation_sets/biggan/1_fake/2.png"],
        lambda key: "<REASONING>the edges are odd</REASONING> <CONCLUSION> This image is real. </CONCLUSION>"
        if "0_real" in key else "It is fake.", 50.0,
        {"real": 100.0, "fake": 0.0, "failures": 50.0, "accuracy_of_read": 100.0, "rouge_l": 200 / 3,
         "bleu_1": 75 * 2.718281828459045 ** -0.25, "average_precision": 50.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_and_scored(name: str, tmp_path: Path):
    task, source, contents, pictures, reply, headline, totals = LAYOUTS[name]
    folder = tmp_path / "d"
    for path, rows in contents.items():
        place = folder / path
        if place.suffix == ".parquet":
            single = tuple(key for key in rows[0] if isinstance(rows[0][key], dict) and set(rows[0][key]) == set(IMAGE))
            parquet(place, rows, single)
        elif place.suffix in (".csv", ".tsv"):
            table(place, rows, "," if place.suffix == ".csv" else "\t")
        else:  # one mapping stands for the whole file
            whole = len(rows) == 1 and (set(rows[0]) <= {"data", "questions"} or "_reasoning" in place.name)
            write(place, rows[0] if whole else rows, lines=place.suffix == ".jsonl")
    for path in pictures:
        picture(folder / path)
    result = run(task, folder, (lambda request: reply(request.id)) if callable(reply) else reply, tmp_path)
    assert result.problems == [] and result.header["source"] == source
    assert result.metrics[0].value == pytest.approx(headline)
    assert {key: result.metrics[0].details[key] for key in totals} == pytest.approx(totals)
    item = load_data(load_task(task), data={task: folder}).items[0]
    assert item.question and item.pictures and prompt_of(item)


def test_blinks_fourteen_parts_and_several_pictures(tmp_path):
    parts = next(s.configs for s in load_task("blink").sources)
    for part in parts:
        row = {"idx": f"val_{part}_1", "question": "Which?", "sub_task": part, "image_1": IMAGE, "image_2": IMAGE,
               "image_3": None, "image_4": None, "choices": ["x", "y"], "answer": "(B)", "explanation": "",
               "prompt": "Which?\n(A) x\n(B) y"}  # fmt: skip
        parquet(tmp_path / f"d/{part}/val-00000-of-00001.parquet", [row], ("image_1", "image_2", "image_3", "image_4"))
    result = run("blink", tmp_path / "d", lambda r: "(B)" if "Jigsaw" in r.id else "A", tmp_path)
    assert len(parts) == 14 and result.metrics[0].value == pytest.approx(100 / 14)
    item = load_data(load_task("blink"), data={"blink": tmp_path / "d"}).items[0]
    assert item.num_images == 2 and item.meta["options"] == ["x", "y"]


def test_figures_to_tables_ask_once_a_picture(tmp_path):
    row = {"imgname": "1.png", "query": "How much?", "label": "10"}
    write(tmp_path / "d/test/test_human.json", [row, row])
    write(tmp_path / "d/test/test_augmented.json", [row])
    (tmp_path / "d/test/tables").mkdir()
    (tmp_path / "d/test/tables/1.csv").write_text("Year,Sales\n2001,10\n2002,20\n")
    picture(tmp_path / "d/test/png/1.png")
    result = run("chartqa_table", tmp_path / "d", "Year | Sales\n2001 | 10\n2002 | 20", tmp_path)
    assert result.num_samples == 1 and result.problems == [] and result.metrics[0].value == pytest.approx(100.0)


def test_pages_are_shown_in_the_order_of_their_numbers(tmp_path):
    rows = {"data": [{"questionId": "1", "question": "Who?", "answers": ["x"], "answers_variants": ["y"], "docId": "d",
                      "answer_type": "extractive", "data_split": "val"}]}  # fmt: skip
    write(tmp_path / "DUDE_gt.json", rows)
    for page in (0, 2, 10):
        picture(tmp_path / f"images/val/d_{page}.jpg", page)
    (item,) = load_data(load_task("dude"), data={"dude": tmp_path}).items
    assert [Path(p.source).stem for p in item.pictures] == ["d_0", "d_2", "d_10"] and item.target == ["x", "y"]


def test_a_descriptive_question_names_its_subplot(tmp_path):
    rows = [{"figure_id": 3, "qids": [1, 19], "answers": ["Loss", "2"], "subplot_loc": "top", "num_subplots": 2}]
    write(tmp_path / "data/descriptive_val.json", rows)
    picture(tmp_path / "images/3.jpg")
    items = load_data(load_task("charxiv_descriptive"), data={"charxiv_descriptive": tmp_path}).items
    assert "For the subplot at top: What is the title?" in prompt_of(items[0])
    assert "How many subplots" in prompt_of(items[1]) and "For the subplot" not in prompt_of(items[1])


def test_options_in_a_text_are_found():
    assert options_in("(a) Open (b) Closed") == ["Open", "Closed"]
    assert options_in("Which?\nA. a b.\nB. the U.S.\nAnswer with A or B.") == ["a b.", "the U.S."]
    assert options_in("A.70°; B.40°") == ["70°", "40°"] and options_in("Is vitamin C. good?") == []
    assert stem_of("Which one? (A) x (B) y") == "Which one?" and stem_of(" none ") == "none"
    assert table_text('"Year","a, b"\n2001, 3') == "Year | a, b\n2001 | 3"
    assert json.dumps(table_text("Y \\t S \\n 1 \\t 2")) == '"Y | S\\n1 | 2"'


def test_answers_go_to_other_harnesses_and_come_back_with_the_same_score(tmp_path):
    """MMVP's four questions: as samples and as a table, forth and back; a file of other questions is refused."""
    _, _, contents, pictures, _, headline, _ = LAYOUTS["mmvp"]
    folder = tmp_path / "d"
    table(folder / "Questions.csv", contents["Questions.csv"], ",")
    for path in pictures:
        picture(folder / path)
    run("mmvp", folder, lambda r: "B" if r.id == "2" else "(a) Open", tmp_path)
    ours = tmp_path / "out/mmvp.jsonl"
    for form, name in (("lmms-eval", "samples.jsonl"), ("vlmevalkit", "table.tsv"), ("vlmevalkit", "table.csv")):
        assert export_answers(ours, tmp_path / name, form) == 4
        back = import_answers(tmp_path / name, "mmvp", tmp_path / name.replace(".", "-"), data={"mmvp": folder})
        assert back.metrics[0].value == headline and back.header["imported_from"] == name
        outputs = [[row["output"] for row in read_predictions(path)] for path in (ours, Path(back.path))]
        assert outputs[0] == outputs[1]
    text = (tmp_path / "table.tsv").read_text().replace("(b)", "(a)", 1)
    (tmp_path / "other.tsv").write_text(text)
    with pytest.raises(DataError, match="question 2 has the target '\\(a\\)' there and '\\(b\\)' here"):
        import_answers(tmp_path / "other.tsv", "mmvp", tmp_path / "x", data={"mmvp": folder})
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(DataError, match="no answer for 1 of 4 questions"):
        import_answers(tmp_path / "short.jsonl", "mmvp", tmp_path / "x", data={"mmvp": folder})
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(DataError, match="question 1 is answered twice"):
        import_answers(tmp_path / "twice.jsonl", "mmvp", tmp_path / "x", data={"mmvp": folder})
