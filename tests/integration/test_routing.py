"""Do routed models train: alone and on several processes, on labels, and without collapsing silently?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.data.routing_labels import (
    LabelFile,
    LabelRule,
    helpful_experts,
    labels_path,
    open_sources,
    target_weights,
)
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt, routing_inputs
from mllm.processing.processor import MllmProcessor
from mllm.recipe import Recipe
from mllm.routers.build import build_router
from mllm.train import run_recipe
from mllm.train.stages.routing.losses import label_source
from mllm.train.stages.routing.monitor import RoutingMonitor
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import TINY_CLIP, picture, tiny_spec, tiny_tokenizer
from tests.integration.train_helpers import LLM, on_machines

EXPERTS = ["left", "right"]
PARTITION_ALL = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
ENCODERS = {
    "base": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "image_size": 14}},
    "left": {**TINY_CLIP},
    "right": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "image_size": 21}},
}
COLOURS = [(250, 20, 20), (20, 20, 250)]


def write_rows(folder: Path, *, rows: int = 24, text_only_every: int = 0) -> Path:
    """Red and blue pictures; every answer has the same length, so that a mean over pictures is a mean over tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    data = []
    for row in range(rows):
        kind = row % 2
        row_data: dict[str, Any] = {"id": f"row{row}", "kind": ["red", "blue"][kind]}
        image = not (text_only_every and row % text_only_every == 2)
        if image:
            Image.new("RGB", (20 + row % 5, 20), COLOURS[kind]).save(folder / f"{row}.png")
            row_data["image"] = f"{row}.png"
        mark = "<image>\n" if image else ""
        row_data["conversations"] = [
            {"from": "human", "value": f"{mark}what?"},
            {"from": "gpt", "value": "ab"[kind] + str(row % 3)},
        ]
        data.append(row_data)
    path = folder / "rows.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def routed_recipe(
    folder: Path, stages: list[dict[str, Any]], *, router: dict[str, Any] | None = None, **data: Any
) -> Recipe:
    tokenizer, file = folder / "tokenizer", folder / "data" / "rows.json"
    if not tokenizer.is_dir():
        tiny_tokenizer().save_pretrained(str(tokenizer))
    if not file.is_file():
        write_rows(file.parent, **data)
    language_model = {**LLM, "attention_dropout": 0.0}
    spec = tiny_spec(
        str(tokenizer),
        language_model={"config": language_model, "tokenizer": str(tokenizer)},
        encoders=ENCODERS,
        connector={"type": "channel_concat", "grid": [2, 2]},
        router=router or {"type": "gate", "experts": EXPERTS, "hidden": 8},
    )
    defaults = {
        "data": {"format": "llava", "path": str(file)},
        "batch_size": 4,
        "max_length": 400,
        "dtype": "float32",
        "schedule": {"type": "constant", "warmup": 0},
        "learn": {"language_model": 1e-3, "connector": 3e-3, "router": 1e-2, "encoders": 1e-3},
    }
    return Recipe.model_validate(
        {
            "name": "routed",
            "seed": 3,
            "output": str(folder / "run"),
            "model": spec.model_dump(),
            "stages": [{**defaults, **stage} for stage in stages],
        }
    )


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[dict[str, Any]]]:
    """Experts are fixed in the data, one row after the other: with two processes, these see other ones, none, or no picture."""
    folder = tmp_path_factory.mktemp("ranks")
    file = write_rows(folder / "data", rows=16, text_only_every=5)
    rows = json.loads(file.read_text())
    choices: list[Any] = [["left"], ["right"], [], ["left", "right"], ["left"], None, ["right"], []]
    for number, row in enumerate(rows):
        row["experts"] = choices[number % len(choices)]
    file.write_text(json.dumps(rows))
    stage = {
        "name": "sft",
        "steps": 6,
        "batch_size": 1,
        "gradient_accumulation": 2,
        "optimizer": {"eps": 1e-3},  # Adam without it makes a step of 1e-9 gradients, which differ between engines
        "learn": {"language_model": 1e-3, "connector": 3e-3, "router": 1e-2, "encoders.left": 1e-3},
    }
    recipe = routed_recipe(folder, [stage])
    run_recipe(recipe, output=folder / "run1")
    return recipe, records(folder / "run1")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", PARTITION_ALL], ids=["zero2", "zero3"])
def test_two_ranks_that_choose_different_experts_or_none_train_like_one_process(
    engine: Any, one_process: tuple[Recipe, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Expert left learns, expert right and the base encoder are frozen (and partitioned all the same under ZeRO-3)."""
    recipe, wanted = one_process
    stage = recipe.stages[0].model_copy(update={"engine": engine, "gradient_accumulation": 1})
    run_recipe(recipe.model_copy(update={"stages": [stage]}), processes=2, output=tmp_path / "run2")
    for one, two in zip(wanted, records(tmp_path / "run2"), strict=True):
        assert one["data"] == two["data"], "the processes saw other samples"
        assert (two["loss"], two["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-5)


# Labels --------------------------------------------------------------------------------------------------------------


def write_labels(folder: Path, *, none_every: int = 0) -> Path:
    """Labels by hand: red pictures need left, blue ones right; every ``none_every``-th row needs none."""
    spec = {"name": "rows", "format": "llava", "path": str(folder / "data" / "rows.json")}
    ((source, _),) = open_sources(spec)
    lines: list[dict[str, Any]] = [
        {"dataset": source.spec.model_dump(mode="json"), "fingerprint": source.fingerprint, "experts": EXPERTS}
    ]
    for row in range(len(source)):
        losses = {"none": 2.0, "left": 0.5 + row % 2, "right": 1.5 - row % 2}
        if none_every and row % none_every == 0:
            losses = {"none": 1.0, "left": 1.0, "right": 1.0}
        lines.append({"row": row, "losses": losses, "experts": helpful_experts(losses, margin=0.05, top_k=1)})
    path = labels_path(source)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ask(checkpoint: Path, **options: Any) -> tuple[Any, Any]:
    """(model, inputs of one red and one blue picture)."""
    model = MllmForConditionalGeneration.from_pretrained(str(checkpoint)).eval()
    processor = MllmProcessor.from_pretrained(str(checkpoint))
    turns = [Turn("user", f"{IMAGE_MARK}\nwhat?")]
    images = [[Image.new("RGB", (22, 20), colour)] for colour in COLOURS]
    inputs = processor(
        text=[render_prompt(processor, turns)] * 2,
        images=images,
        return_tensors="pt",
        add_special_tokens=False,
        padding=True,
    )
    questions = routing_inputs(processor, turns, 1)["router_input_ids"].repeat(2, 1)
    model.generate(**inputs, router_input_ids=questions, max_new_tokens=2, **options)
    return model, processor


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_a_gate_learns_its_labels_without_running_experts(targets: str, tmp_path: Path) -> None:
    stage = {
        "name": "route",
        "kind": "routing",
        "steps": 40,
        "learn": {"router": 3e-2},
        "options": {"labels": "data", "targets": targets, "temperature": 0.1},
    }
    recipe = routed_recipe(tmp_path, [stage])
    with pytest.raises(ConfigError, match=r"no routing labels at .*rows\.json\.routing\.jsonl; run mllm route label"):
        run_recipe(recipe, output=tmp_path / "early")
    write_labels(tmp_path)
    final = run_recipe(recipe)
    losses = [r["loss"] for r in records(tmp_path / "run")]
    assert losses[0] > 0.4 and losses[-1] < 0.1
    last = records(tmp_path / "run")[-1]["routing"]
    assert set(last["use"]) == set(EXPERTS) and last["doubt"] < 0.5
    model, _ = ask(final)
    assert model.last_routing.weights.tolist() == [[1, 0], [0, 1]]
    assert model.model.vision_tower.num_encoded == {"base": 2, "left": 1, "right": 1}


def test_the_language_model_learns_to_route_and_answers_with_the_experts_it_named(tmp_path: Path) -> None:
    router = {
        "type": "language_model",
        "experts": EXPERTS,
        "capabilities": {"left": "Red.", "right": "Blue."},
        "instruction": "Which?",
        "top_k": 1,
    }
    stage = {
        "name": "route",
        "kind": "routing",
        "steps": 60,
        "learn": {"language_model": 3e-3, "connector": 3e-3},
        "options": {"labels": "data"},
    }
    recipe = routed_recipe(tmp_path, [stage], router=router)
    write_labels(tmp_path)
    final = run_recipe(recipe)
    with pytest.raises(ConfigError, match=r"pass tokenizer=processor\.tokenizer"):
        ask(final)
    model, processor = ask(final, tokenizer=MllmProcessor.from_pretrained(str(final)).tokenizer)
    assert model.last_routing.weights.tolist() == [[1, 0], [0, 1]]
    counts = model.model.vision_tower.num_encoded
    assert counts == {"base": 2, "left": 1, "right": 1}, "the base encoder must run once for both passes"
    model, _ = ask(final, tokenizer=processor.tokenizer, expert_budget=0)
    assert not model.last_routing.weights.any()


@pytest.mark.nightly
def test_machines_with_folders_of_their_own_measure_half_of_the_losses_each_and_have_all(tmp_path: Path) -> None:
    stage = {"name": "route", "kind": "routing", "steps": 2, "learn": {"router": 3e-2}, "options": {"batch_size": 2}}
    recipe = routed_recipe(tmp_path, [stage])
    assert on_machines([recipe] * 2, tmp_path / "own-0", tmp_path / "own-1") == [None, None]
    run_recipe(recipe, output=tmp_path / "one")
    (wanted,) = (tmp_path / "one" / "routing_labels" / "route").iterdir()
    for output in ("own-0", "own-1"):
        (found,) = (tmp_path / output / "routing_labels" / "route").iterdir()
        a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in (wanted, found))
        assert [entry.get("row") for entry in b] == [entry.get("row") for entry in a] and b[0] == a[0]
        assert [entry.get("experts") for entry in b] == [entry.get("experts") for entry in a]


def test_measured_losses_are_the_models_own_and_survive_a_kill(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = routed_recipe(tmp_path, [{"name": "sft", "steps": 1}], rows=9, text_only_every=5)
    from mllm.models.build import build_model
    from mllm.processing.chat import encode_sample

    torch.manual_seed(0)
    model, processor = build_model(recipe.model)
    ((source, _),) = open_sources(recipe.stages[0].data)
    path = label_source(model.train(), processor, source, tmp_path / "whole.jsonl", batch_size=4)
    assert model.training, "the model's mode is put back"
    whole = LabelFile(path)
    assert sorted(whole.rows) == list(range(9))
    assert whole.rows[2]["losses"] is None and whole.rows[2]["reason"] == "no image"
    model.eval()
    sample = encode_sample(processor, source[5])
    inputs = {"input_ids": sample.input_ids[None], "labels": sample.labels[None], **sample.pixels, **sample.extras}
    for name, weights in {"none": [0.0, 0.0], "left": [1.0, 0.0], "right": [0.0, 1.0]}.items():
        inputs["expert_weights"] = torch.tensor([weights])
        with torch.no_grad():
            wanted = model(**inputs).loss.item()
        assert whole.rows[5]["losses"][name] == pytest.approx(wanted, abs=2e-5)

    lines = path.read_text().splitlines()
    part = tmp_path / "killed.jsonl.part0"
    part.write_text("\n".join(lines[:5]) + '\n{"row": 7, "los')
    seen: list[int] = []
    rows = {source[row].id: row for row in range(9)}

    def counting(processor: Any, sample: Any, length: int | None) -> Any:
        seen.append(rows[sample.id])
        return encode_sample(processor, sample, length)

    monkeypatch.setattr("mllm.train.stages.routing.losses.encode_sample", counting)
    assert (
        label_source(model, processor, source, tmp_path / "killed.jsonl", batch_size=4).read_text() == path.read_text()
    )
    assert sorted(seen) == [4, 5, 6, 7, 8]
    before = path.stat().st_mtime_ns
    label_source(model, processor, source, path)
    assert path.stat().st_mtime_ns == before and len(seen) == 5, "a complete file is left alone"
    with pytest.raises(DataError, match=r"was made with margin 0\.05, now it is 0\.2"):
        label_source(model, processor, source, path, rule=LabelRule(margin=0.2))

    image = source[5].images[0]
    picture(77).save(image)  # replaced: its losses are of another picture
    seen.clear()
    label_source(model, processor, source, path)
    assert seen == [5] and LabelFile(path).rows[5]["losses"] != whole.rows[5]["losses"]
    spec = DatasetSpec(name="rows", format="routing_labels", path=str(path))
    picture(78).save(image)
    measured = open_source(spec)
    with pytest.raises(DataError, match="is not the one its routing losses were measured on"):
        measured[[row for row in range(9) if whole.rows[row]["losses"] is not None].index(5)]


def test_the_command_line_labels_data_and_reports_choices_scores_and_savings(tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from mllm.cli import route

    stage = {"name": "route", "kind": "routing", "steps": 30, "learn": {"router": 3e-2}, "options": {"labels": "data"}}
    recipe = routed_recipe(tmp_path, [stage])
    labels = write_labels(tmp_path, none_every=6)
    final, rows = run_recipe(recipe), tmp_path / "data" / "rows.json"
    app = typer.Typer()
    route.add_to(app)

    def mllm(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["route", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    task = tmp_path / "task.yaml"
    questions = [
        {"id": str(i), "image": f"{i}.png", "question": "what?", "answer": "a", "kind": "red"} for i in range(4)
    ]
    (tmp_path / "data" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task.write_text(
        f"""{{version: 1, description: four questions, licence: CC0-1.0, data_dir: {tmp_path / "data"},
        sources: [{{name: a, format: jsonl, files: [questions.jsonl],
        columns: {{id: id, question: question, answers: answer, images: image, category: kind}}}}],
        prompt: "{{{{ question }}}}", generation: {{max_new_tokens: 2}}, metrics: [exact_match]}}"""
    )
    out = mllm("report", final, rows, "--tasks", task, "--output", tmp_path / "report", "--device", "cpu")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["total"]["samples"] == 24 and report["total"]["experts_per_sample"] == 1
    by_kind = {group["kind"]: group for group in report["groups"]}
    assert by_kind["red"]["use"] == {"left": 1, "right": 0} and by_kind["blue"]["use"] == {"left": 0, "right": 1}
    assert by_kind["blue"]["agreement"] == 1 and by_kind["red"]["right_expert"] == 1
    assert report["total"]["agreement"] == pytest.approx(20 / 24), (
        "four rows need no expert, and a gate without threshold runs one"
    )
    assert 0 < report["total"]["saved"] < 1 and report["total"]["gflops"] < report["total"]["gflops_all"]
    scores = {entry["name"]: entry for entry in report["scores"]}
    assert list(scores) == ["routed", "all experts", "left alone", "right alone", "no expert"]
    assert [scores[name]["experts"] for name in scores] == [1, 2, 1, 1, 0]
    assert scores["no expert"]["gflops"] < scores["left alone"]["gflops"] < scores["all experts"]["gflops"]
    assert "blue" in out and "routed" in out
    card = (final / "README.md").read_text()
    assert "| all experts |" in card and card.count("## Routing") == 1
    (final / "README.md").write_text(f"{card}\nkept\n")
    mllm("report", final, rows, "--tasks", task, "--output", tmp_path / "report", "--device", "cpu", "--budget", "0")
    again = (final / "README.md").read_text()
    assert again.count("## Routing") == 1 and again.endswith("kept\n") and "0.00 experts per sample" in again

    labels.unlink()
    out = mllm("label", final, rows, "--limit", "6", "--device", "cpu")
    assert "6 samples" in out and labels.name in out
    assert LabelFile(labels).header["made_by"] == str(final) and len(LabelFile(labels).rows) == 6  # type: ignore[index]


def test_losses_become_hard_and_soft_targets() -> None:
    losses = {"none": 1.0, "a": 0.2, "b": 0.9, "c": 0.3}
    assert helpful_experts(losses, margin=0.05, top_k=3) == ["a", "c", "b"]
    assert helpful_experts(losses, margin=0.15, top_k=1) == ["a"]
    rule = LabelRule(margin=0.15)
    assert target_weights(losses, "abc", rule, 2) == [0.5, 0.0, 0.5]
    soft = target_weights(losses, "abc", LabelRule(targets="soft", temperature=0.1), 1)
    assert sum(soft) == pytest.approx(1) and soft[0] / soft[2] == pytest.approx(2.71828, rel=1e-4)
    assert target_weights({"none": 0.1, "a": 0.1, "b": 0.3}, "ab", rule, 1) == [0.5, 0.5]


def test_a_collapsed_router_is_reported_once_and_a_balanced_one_never(caplog: pytest.LogCaptureFixture) -> None:
    router = build_router({"type": "gate", "experts": ["a", "b", "c"], "depth": 1}, 4, 4)
    monitor = RoutingMonitor(router)
    with torch.no_grad():
        router.mlp[-1].weight.zero_()
        router.mlp[-1].bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            router(torch.randn(40, 4), torch.randn(40, 4))
            report = monitor.report()["routing"]
    assert report["use"] == {"a": 1.0, "b": 0.0, "c": 0.0} and report["spread"] < 0.1 and report["doubt"] < 0.1
    assert len(caplog.records) == 1
    assert "router collapse: 100 % of the last 160 images go to expert 'a' and almost none to b, c" in caplog.text
    caplog.clear()
    with torch.no_grad():
        router.mlp[-1].weight.normal_(std=3.0)
        router.mlp[-1].bias.zero_()
    for _ in range(4):
        router(torch.randn(100, 4), torch.randn(100, 4))
        report = monitor.report()["routing"]
    assert not caplog.records and report["spread"] > 0.9 and report["images"] == 100
    assert monitor.report() == {}
    monitor.close()
