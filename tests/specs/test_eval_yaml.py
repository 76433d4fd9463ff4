"""Does every shipped task and suite parse, name metrics that exist, and say what it is?"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mllm import assets
from mllm.errors import ConfigError, UnknownName
from mllm.eval.metrics import METRICS, build_metric
from mllm.eval.task import expand_tasks, load_suite, load_task

ROOT = Path(__file__).parents[2]
TASKS = sorted(path.stem for path in (ROOT / "eval/tasks").glob("*.yaml"))
SUITES = sorted(path.stem for path in (ROOT / "eval/suites").glob("*.yaml"))
WANTED = """
vqav2 gqa textvqa vizwiz docvqa infovqa chartqa chartqapro plotqa charxiv ai2d scienceqa scienceqa_img mmmu mmmu_pro
mmbench mmstar seed pope mme ocrbench mathvista refcoco_val refcoco_plus_testa refcocog_test cv_bench vsibench videomme
mvbench demo_charts demo_digits mmvp blink realworldqa vstar naturalbench hallusionbench amber countbench tallyqa mme_realworld
mme_realworld_lite seed2_plus mmt_bench mathverse mathvision wemath chartmuseum chartx chartx_table chartbench evochart
charxiv_descriptive chartqa_human chartqa_augmented chartqa_table mpdocvqa dude slidevqa embspatial 3dsrbench sat
sparbench omnispatial mmfr
"""


def test_the_promised_tasks_and_suites_are_there():
    assert set(TASKS) >= set(WANTED.split()) and len(TASKS) >= 37
    assert {"charts", "vqa", "documents", "spatial", "quick", "multi_encoder", "hallucination", "judged"} <= set(SUITES)


@pytest.mark.parametrize("name", TASKS)
def test_task_is_complete(name):
    task = load_task(str(ROOT / "eval/tasks" / f"{name}.yaml"))
    assert task.name == name and task.description and task.licence
    metrics = task.build_metrics()
    assert metrics and all(metric.protocol for metric in metrics)
    assert task.frames is None or task.frames > 0
    assert all(source.columns.answers for source in task.sources), "every shipped task is scored"
    text = (ROOT / "eval/tasks" / f"{name}.yaml").read_text()
    assert text.startswith("# "), "a task's file opens with a line on what it measures"


@pytest.mark.parametrize("name", SUITES)
def test_suite_names_tasks_that_exist(name):
    suite = load_suite(str(ROOT / "eval/suites" / f"{name}.yaml"))
    assert suite.description and set(suite.tasks) <= {*TASKS, "*"}


def test_every_task_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(TASKS) <= set(assets.available("eval/tasks"))
    assert expand_tasks(["quick"]) == load_suite("quick").tasks


def test_the_readme_lists_every_task_with_its_size_licence_and_headline():
    text = (ROOT / "eval/README.md").read_text()
    for name in TASKS:
        task = load_task(name)
        line = f"| {name} | {task.size or ''} | {task.licence} | `{task.build_metrics()[0].name}` |"
        assert line in text, f"eval/README.md: no line that begins {line!r}"


def edited(tmp_path: Path, change) -> str:
    data = yaml.safe_load((ROOT / "eval/tasks/demo_charts.yaml").read_text())
    change(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(promt="x"), "mine.yaml.promt: unknown key, did you mean 'prompt'"),
        (lambda d: d.update(metrics=["relaxd"]), "mine.yaml.metrics: unknown metric 'relaxd', did you mean"),
        (lambda d: d.update(metrics=["mme", "mme"]), "listed twice"),
        (lambda d: d.update(prompt="{{ question"), "mine.yaml.prompt: not a Jinja template"),
        (lambda d: d["sources"][0]["columns"].update(question="a +"), "question: 'a \\+' is not a Jinja expression"),
        (lambda d: d["sources"][0].update(format="xml"), "mine.yaml.sources.demo.format"),
        (lambda d: d["sources"][0].update(files=[]), "format jsonl needs files"),
        (lambda d: d["generation"].update(max_new_tokens=0), "generation.max_new_tokens"),
        (lambda d: d.pop("version"), "mine.yaml.version: this key is required"),
    ],
)
def test_a_mistake_is_named_by_its_path(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_task(edited(tmp_path, change))


def test_an_unknown_task_suggests_one():
    with pytest.raises(UnknownName, match="did you mean 'chartqa'"):
        load_task("chartqaa")


def test_overrides_reach_into_the_task():
    assert load_task("demo_charts", ["generation.max_new_tokens=5"]).generation.max_new_tokens == 5


def test_the_examples_of_the_readme_work(tmp_path):
    text = (ROOT / "eval/README.md").read_text()
    task, metric = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("yaml", "python"))
    (tmp_path / "mine.yaml").write_text(task)
    assert load_task(str(tmp_path / "mine.yaml")).build_metrics()[0].name == "exact_match"
    try:
        exec(compile(metric, "README", "exec"), {"__name__": "readme"})
        assert build_metric("starts_with").score("abc", "ab", {}).value == 1.0
    finally:
        METRICS._classes.pop("starts_with", None)
    named = {word for word in text.replace("(random_fallback=42)", "").split("`") if word in METRICS}
    assert {"vqa_evalai", "relaxed_strict", "anls_rrc_raw", "mmmu_lmms_eval", "charxiv_proxy"} <= named
