"""Do the commands behind a score (ablate, stress, contamination, report) do what their help says, and do reports show it?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import load_data
from mllm.eval.run import evaluate, report_again
from mllm.eval.studies.ablate import WARNING
from mllm.eval.studies.contamination import OverlapFinder, find_overlaps, perceptual_hash
from mllm.eval.studies.contamination_report import read_training, run_contamination, training_sources
from mllm.eval.studies.study import Study, Table, load_studies, print_table, save_study, study_html, study_markdown
from mllm.eval.task import load_task
from tests.helpers import tiny_model
from tests.unit.eval.rules import RuleGenerator, constant
from tests.unit.eval.test_integrity import open_data, scene
from tests.unit.eval.test_runner import make_data


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_a_study_survives_its_file_and_is_shown_the_same_everywhere(tmp_path):
    study = Study(
        "stress", "Title", ["a <note>"], [Table("Caption", ("task", "x"), [("a|b", "1.0")])], {"x": float("nan")}
    )
    paths = save_study(study, tmp_path)
    assert json.loads(paths["json"].read_text())["data"] == {"x": None}
    loaded = load_studies(tmp_path)
    assert len(loaded) == 1 and loaded[0].tables == study.tables and loaded[0].notes == study.notes
    assert study_markdown(study, level=2) == [
        "## Title", "", "- a <note>", "", "**Caption**", "", "| task | x |", "| --- | --- |", "| a\\|b | 1.0 |",
    ]  # fmt: skip
    page = study_html(study)
    assert "a &lt;note&gt;" in page and "<td>a|b<td class=n>1.0" in page
    paths["json"].write_text("{}")
    with pytest.raises(DataError, match=r"stress\.json: no study can be read"):
        load_studies(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    model, processor = tiny_model(folder / "tokenizer")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    return folder / "final"


def test_ablate_from_the_command_line_lands_in_the_report(checkpoint, tmp_path):
    folder = make_data(tmp_path / "d", 8)
    common = ["--tasks", "demo_charts", "--data", f"demo_charts={folder}", "--device", "cpu", "--limit", "4",
              "--output", str(tmp_path / "o")]  # fmt: skip
    invoke("run", str(checkpoint), *common)
    out = invoke("ablate", str(checkpoint), *common, "--encoders", "detail", "--modes", "drop,mean")
    assert "[1/3] intact" in out and "[3/3] detail: mean" in out and "Score without an encoder" in out
    assert "arXiv 2606.03879" in out and "report.html" in out
    data = json.loads((tmp_path / "o/ablation.json").read_text())["data"]
    assert [(e["encoder"], e["mode"]) for e in data["effects"]] == [("detail", "drop"), ("detail", "mean")]
    assert data["costs"][0]["milliseconds"] > 0 and data["costs"][0]["gflops"] > 0
    for report in ("report.md", "report.html", "ablation.md"):
        text = (tmp_path / "o" / report).read_text()
        assert WARNING in text and "effective rank" in text, report
    assert "| detail | drop | demo_charts | relaxed_strict v2 |" in (tmp_path / "o/report.md").read_text()
    with pytest.raises(ConfigError, match="encoder 'spatial': the model has semantic, detail"):
        invoke("ablate", str(checkpoint), *common, "--encoders", "spatial")
    with pytest.raises(ConfigError, match="not among the tasks demo_charts"):
        invoke("ablate", str(checkpoint), *common, "--data", "chartqa=/x")
    with pytest.raises(ConfigError, match="expected task=/folder"):
        invoke("ablate", str(checkpoint), *common, "--data", "chartqa")


def test_stress_from_the_command_line_splits_a_runs_score(tmp_path):
    folder = open_data(tmp_path / "d", lambda k: ["red", "round", str(k)][k % 3])  # sizes cannot be known from words
    rule = RuleGenerator(lambda r: "red" if "colour" in r.turns[-1].content else "?")
    evaluate(rule, ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, progress=False)
    out = invoke("stress", "demo_charts", "--data", f"demo_charts={folder}", "--scores", str(tmp_path / "o"),
                 "--trees", "20")  # fmt: skip
    assert "66.7 %" in out and "words suffice" in out
    data = json.loads((tmp_path / "o/stress.json").read_text())["data"]
    assert len(data["results"][0]["answered"]) == 60 and data["results"][0]["kind"] == "open"
    split = data["split"]["demo_charts"]
    assert split["all_samples"] == pytest.approx(100 / 3) and split["without"] == 0.0 and split["only"] == 50.0
    assert "## Text-only stress test" in (tmp_path / "o/report.md").read_text()


def benchmark(folder: Path, seeds: list[int], name: str = "test.jsonl") -> Path:
    """Questions of ten words with a picture each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        scene(seed).save(folder / f"{seed}.png")
        question = f"In chart number {seed}, how large is the tallest of all bars?"
        rows.append({"id": f"b{seed}", "image": f"{seed}.png", "question": question, "answer": "5", "kind": "a"})
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def training_file(folder: Path) -> Path:
    """Six rows: one with a benchmark's picture, one with its words, one with both, two clean, one that is broken."""
    folder.mkdir()
    scene(2).resize((80, 60)).save(folder / "two.jpg", quality=70)
    scene(4).save(folder / "four.png")
    scene(90).save(folder / "other.png")
    (folder / "broken.png").write_bytes(b"no picture")
    words = "In chart number {}, how large is the tallest of all bars?"
    pairs = [("two.jpg", "Describe."), ("other.png", words.format(3)), ("four.png", words.format(4)),
             ("other.png", "Describe."), ("other.png", "What?"), ("broken.png", words.format(5))]  # fmt: skip
    rows = [
        {"id": f"t{k}", "images": [image], "messages": [
            {"role": "user", "content": f"<image>\n{text}"}, {"role": "assistant", "content": "yes"}]}
        for k, (image, text) in enumerate(pairs)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "train.jsonl"


def test_contamination_from_the_command_line_shows_scores_with_and_without(tmp_path):
    folder, train = benchmark(tmp_path / "d", list(range(8))), training_file(tmp_path / "t")
    rule = RuleGenerator(lambda request: "5" if request.id in ("b2", "b3", "b4") else "x")
    evaluate(rule, ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, progress=False)
    out = invoke(
        "contamination", "--train", str(train), "--tasks", "demo_charts", "--data", f"demo_charts={folder}",
        "--scores", str(tmp_path / "o"), "--min-share", "0.9",
    )  # fmt: skip
    assert "2 (25.0 %)" in out and "Scores with and without the overlaps" in out
    data = json.loads((tmp_path / "o/contamination.json").read_text())["data"]
    found = {(o["id"], o["kind"], o["training_id"]) for o in data["overlaps"]["demo_charts"]}
    assert found == {("b2", "image", "train: t0"), ("b3", "text", "train: t1"), ("b4", "image", "train: t2"),
                     ("b4", "text", "train: t2"), ("b5", "text", "train: t5")}  # fmt: skip
    assert data["training"]["rows"] == {"train": 6} and "broken.png" in data["training"]["problems"][0]
    scores = {kind: entries[0] for kind, entries in data["scores"]["demo_charts"].items()}
    assert {kind: s["num_overlapping"] for kind, s in scores.items()} == {
        "picture": 2, "question": 3, "both": 1, "either": 4
    }  # fmt: skip
    assert scores["either"]["all_samples"] == 37.5 and scores["either"]["without"] == 0.0
    assert scores["either"]["only"] == 75.0 and scores["both"]["only"] == 100.0
    report = (tmp_path / "o/report.md").read_text()
    assert (
        "## Contamination" in report
        and "| demo_charts | relaxed_strict v2 | either | 37.50 | 0.00 | 75.00 | 8 | 4 |" in report
    )
    assert "1 training rows or pictures could not be read" in report


def test_several_benchmarks_are_met_in_one_pass_as_each_alone(tmp_path):
    first, second = benchmark(tmp_path / "a", [0, 1, 2]), benchmark(tmp_path / "b", [2, 3, 4])
    train = training_file(tmp_path / "t")
    tasks = [load_data(load_task("demo_charts"), data={"demo_charts": place}) for place in (first, second)]
    tasks[1].task = tasks[1].task.model_copy(update={"name": "second"})
    sources = training_sources([str(train), str(train)])
    assert len(sources) == 1, "the same data are read once"
    finder = OverlapFinder(tasks, min_share=0.9)
    read = read_training(finder, sources, progress=False)
    assert read.rows == {"train": 6} and len(read.problems) == 1
    together = finder.overlaps()
    assert [o.id for o in together["demo_charts"]] == ["b2"] and {o.id for o in together["second"]} == {
        "b2",
        "b3",
        "b4",
    }
    words = OverlapFinder(tasks, min_share=0.9, images=False)
    assert not words.wants_pictures and read_training(words, sources, progress=False).problems == []
    assert [o.kind for o in words.overlaps()["second"]] == ["text", "text"]


def test_training_data_are_found_by_every_name_they_have(tmp_path, monkeypatch):
    train = training_file(tmp_path / "t")
    spec = f"format: messages\npath: {train}\n"
    (tmp_path / "data/datasets").mkdir(parents=True)
    (tmp_path / "data/mixtures").mkdir()
    (tmp_path / "data/datasets/mine.yaml").write_text(spec)
    (tmp_path / "data/mixtures/mix.yaml").write_text("description: d\ndatasets:\n  - {dataset: mine, repeat: 2}\n")
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in training_sources(["mine", "mix"])] == ["mine"]
    assert [len(source) for source in training_sources(["data/datasets/mine.yaml"])] == [6]
    with pytest.raises(ConfigError, match="a folder without recipe"):
        training_sources([str(tmp_path / "data")])
    with pytest.raises(ConfigError, match="no such file"):
        training_sources(["nowhere.jsonl"])
    study = run_contamination(["mix"], ["demo_charts"], tmp_path / "o", progress=False, limit=2,
                              data={"demo_charts": benchmark(tmp_path / "d", [2, 3])})  # fmt: skip
    assert study.data["training"]["rows"] == {"mine": 2} and len(study.data["overlaps"]["demo_charts"]) == 2
    assert study.data["scores"] == {} and not (tmp_path / "o/report.md").exists()


def test_pictures_of_one_colour_are_no_evidence(tmp_path):
    blank = Image.new("RGB", (50, 40), (255, 255, 255))
    assert perceptual_hash(blank) is None and perceptual_hash(scene(1)) is not None
    noise = Image.fromarray(np.random.default_rng(0).integers(250, 254, (40, 50, 3), dtype=np.uint8))
    assert perceptual_hash(noise) is None
    folder = make_data(tmp_path / "d", 4)  # pictures of one colour each
    data = load_data(load_task("demo_charts"), data={"demo_charts": folder})
    assert find_overlaps(data, [("t", "", [blank]), ("u", "", [Image.open(folder / "0.png")])]) == []


def test_a_report_is_made_anew_from_its_predictions(tmp_path):
    folder = make_data(tmp_path / "d", 6)
    first = evaluate(
        RuleGenerator(constant("1")), ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, progress=False,
        blind=True,
    )  # fmt: skip
    again = report_again(tmp_path / "o", show=False)
    assert again["demo_charts"].metrics == first["demo_charts"].metrics
    assert (
        again["demo_charts"].blind is not None and again["demo_charts"].blind_score == first["demo_charts"].blind_score
    )
    assert "| demo_charts | relaxed_strict v2 | 16.67 % |" in (tmp_path / "o/report.md").read_text()
    assert "demo_charts" in invoke("report", str(tmp_path / "o"))
    with pytest.raises(ConfigError, match="holds no finished prediction file"):
        report_again(tmp_path / "d")


def test_a_table_wider_than_the_console_stacks_words_over_numbers_and_breaks_no_name():
    headings = ("encoder", "task", "score", "method")
    rows = [("semantic", "demo_charts", "1.25", "cluster bootstrap"), ("spatial", "x", "10.00", "McNemar exact")]

    def shown(width: int, words=(0, 1, 3)) -> list[str]:
        console = Console(width=width, file=io.StringIO())
        print_table(console, headings, rows, words)
        return console.file.getvalue().splitlines()

    assert shown(80) == [
        "encoder   task         score  method",
        "semantic  demo_charts   1.25  cluster bootstrap",
        "spatial   x            10.00  McNemar exact",
    ]
    assert shown(45) == [
        "encoder · task · method", "  score",
        "semantic · demo_charts · cluster bootstrap", "   1.25",
        "spatial · x · McNemar exact", "  10.00",
    ]  # fmt: skip
    assert all(len(line) <= 30 for line in shown(30, words=(0, 1, 2, 3))), "words alone are folded"
