"""What does a trained recipe leave behind, and what happens when it is started again, stopped, or fed wrong things?"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mllm.config import validate
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.recipe import Recipe, load_recipe
from mllm.train import run_recipe
from mllm.train.checkpoint.resume import latest_checkpoint
from mllm.train.observe.spikes import TrainingDiverged
from tests.integration.train_helpers import make_recipe, metrics, write_data

TWO = [
    {"name": "align", "steps": 3, "learn": {"connector": 1e-2}},
    {
        "name": "sft",
        "epochs": 0.5,
        "gradient_accumulation": 4,
        "learn": {"language_model": 1e-3, "connector": 1e-3},
        "dtype": "bfloat16",
        "optimizer": {"weight_decay": 0.1},
    },
]


def test_two_stages_end_in_a_directory_that_transformers_opens_and_are_not_trained_again(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mllm  # noqa: F401

    recipe = make_recipe(tmp_path, stages=TWO)
    final = run_recipe(recipe)
    output = tmp_path / "run"
    assert final == output / "final" and not (output / "checkpoints" / "sft").exists()
    records = metrics(output)
    assert [(r["stage"], r["step"]) for r in records] == [
        ("align", 1),
        ("align", 2),
        ("align", 3),
        ("sft", 1),
        ("sft", 2),
    ]
    assert set(records[0]["lr"]) == {"connector"} and set(records[3]["lr"]) >= {"language_model", "connector"}
    model = AutoModelForImageTextToText.from_pretrained(str(final))
    processor = AutoProcessor.from_pretrained(str(final))
    assert model.dtype == torch.bfloat16 and model.config.text_config.use_cache
    tokens = processor.tokenizer("hello", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=3).shape[1] <= tokens.shape[1] + 3
    again = load_recipe(str(final / "recipe.yaml"))
    assert again.model_dump() == recipe.model_dump()
    info = json.loads((output / "run.json").read_text())
    assert info["seed"] == 3 and info["packages"]["torch"] == torch.__version__
    assert info["stages"]["align"]["groups"] == [
        {"group": "connector", "tensors": 4, "parameters": 2880, "lr": 0.01, "weight_decay": 0.0}
    ]
    assert info["stages"]["sft"]["steps"] == 2 and "mixed" in info["stages"]["sft"]["data"]
    assert (output / "loss.png").stat().st_size > 1000 and list((output / "tensorboard").iterdir())
    before = (output / "metrics.jsonl").read_bytes()
    assert run_recipe(recipe, resume=True) == final
    assert (output / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="already holds a run; go on with --resume"):
        run_recipe(recipe)


def test_the_second_stage_starts_from_the_first_and_frozen_parts_never_move(tmp_path):
    from safetensors.torch import load_file

    stages = [
        {"name": "align", "steps": 2, "learn": {"connector": 1e-2}},
        {"name": "sft", "steps": 2, "learn": {"language_model": 1e-3}},
    ]
    run_recipe(make_recipe(tmp_path, stages=stages))
    first, second = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("align", "sft"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.startswith(("model.language_model.", "lm_head")) for name in changed)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "epochs": 1, "batch_size": 1, "engine": "zero1"}], rows=12)
    final = run_recipe(recipe, stop_after=4)
    assert not final.exists()
    reader = latest_checkpoint(tmp_path / "run" / "checkpoints" / "sft")
    assert reader is not None and reader.progress.step == 4 and reader.progress.samples == 4
    assert run_recipe(recipe, processes=2, resume=True) == final and final.is_dir()
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 9)) and records[-1]["samples"] == 12


def test_a_loss_that_is_not_finite_names_the_samples_and_leaves_the_checkpoint(tmp_path):
    stage = {"name": "sft", "steps": 8, "save_every": 1, "learn": {"language_model": 1e32}, "schedule": {"warmup": 0}}
    recipe = make_recipe(tmp_path, stages=[stage])
    with pytest.raises(
        TrainingDiverged, match=r"became (nan|inf).*Samples of this step: mixed/mixed\d+, mixed/mixed\d+"
    ):
        run_recipe(recipe)
    reader = latest_checkpoint(tmp_path / "run" / "checkpoints" / "sft")
    assert reader is not None and reader.progress.step >= 1 and not reader.passed_over


def test_a_run_tells_each_datasets_loss_the_experts_that_ran_and_where_time_went(tmp_path, capsys):
    mixed = {"format": "llava", "path": str(write_data(tmp_path / "data", rows=8))}
    other = {"format": "llava", "path": str(write_data(tmp_path / "data", rows=8, name="other", text_only_every=0))}
    data = {"datasets": [{"dataset": mixed}, {"dataset": other}]}
    router = {"router": {"type": "gate", "experts": ["detail"], "top_k": 1, "explore": 1.0}}
    learn = {"language_model": 1e-3, "router": 1e-3}
    recipe = make_recipe(
        tmp_path, stages=[{"name": "sft", "epochs": 1, "batch_size": 4, "data": data, "learn": learn}], model=router
    )
    run_recipe(recipe, profile=1)
    output, told = tmp_path / "run", "".join(capsys.readouterr())
    assert "sft-0: a profiled step of " in told and "matrix products " in told and " ms (" in told
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {name for r in records for name in r["dataset_loss"]} == {"mixed", "other"}
    for record in records:
        assert min(record["dataset_loss"].values()) <= record["loss"] + 1e-6
        assert sum(record["routing"]["ran"].values()) == record["images"]
        assert set(record["grad_norms"]) == {"language_model", "router"} and 0 <= record["data_wait"] <= 1
    stage = json.loads((output / "run.json").read_text())["stages"]["sft"]
    assert stage["experts_ran"] == {"detail": sum(r["images"] for r in records)}
    assert stage["sampler"]["position"] == {"window": 1, "batch": 0} and stage["samples"] == 16
    trace = json.loads((output / "profile" / "sft-0.json").read_text())
    assert any("AdamW" in str(event.get("name")) for event in trace["traceEvents"])
    assert "aten::mm" in (output / "profile" / "sft-0.txt").read_text()


def test_where_a_step_goes_is_told_once_by_itself_and_changes_no_bit(tmp_path, capsys, monkeypatch):
    from mllm.train.observe import profiling

    monkeypatch.setattr(profiling, "BY_ITSELF", 1)
    monkeypatch.setattr(profiling, "SHORTEST", 4)
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 4, "learn": {"encoders": 1e-3, "connector": 1e-3}}])
    told, weights = {}, {}
    for name, profile in (("with", None), ("without", 0)):
        final = run_recipe(recipe, output=tmp_path / name, profile=profile)
        told[name], weights[name] = capsys.readouterr().out, load_file(final / "model.safetensors")
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert all(torch.equal(value, weights["without"][key]) for key, value in weights["with"].items())
    line = next(line for line in told["with"].splitlines() if "sft: a step takes" in line)
    assert "encoders" in line and "update" in line and "waiting for data" in line
    assert told["with"].count("a step takes") == 1 and "a step takes" not in told["without"]
    found = json.loads((tmp_path / "with" / "run.json").read_text())["stages"]["sft"]["step_time"]
    assert found["after_steps"] == 3 and sum(found["parts_ms"].values()) == pytest.approx(found["ms"], abs=0.02)
    assert "step_time" not in json.loads((tmp_path / "without" / "run.json").read_text())["stages"]["sft"]


def test_the_number_of_workers_is_chosen_while_training_and_changes_no_bit(tmp_path, capsys, monkeypatch):
    from mllm.data import workers

    monkeypatch.setattr(workers, "WARM_UP", 1)
    monkeypatch.setattr(workers, "MEASURED", 2)
    monkeypatch.setattr(workers, "cores_per_process", lambda: 3)
    monkeypatch.setattr(workers, "needed", lambda reading, step, cores: 1 if reading > 0 and step > 0 else 0)
    stage = {"name": "sft", "steps": 5, "gradient_accumulation": 2}
    for name, number in (("auto", "auto"), ("inside", 0)):
        run_recipe(make_recipe(tmp_path, stages=[{**stage, "num_workers": number}]), output=tmp_path / name)
    told = capsys.readouterr().out
    assert told.count("sft: num_workers auto: 1 for each process") == 1 and "(3 cores a process)" in told
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "inside")
    stages = [json.loads((tmp_path / name / "run.json").read_text())["stages"]["sft"] for name in ("auto", "inside")]
    assert [stage["num_workers"] for stage in stages] == [1, 0] and stages[0]["sampler"] == stages[1]["sampler"]


def test_resuming_with_other_settings_says_which(tmp_path):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 4}])
    run_recipe(recipe, stop_after=1)
    changed = validate(Recipe, {**recipe.model_dump(), "seed": 4})
    with pytest.raises(CheckpointError, match=r"settings \(seed: 3 then, 4 now\)"):
        run_recipe(changed, resume=True)
    deeper = recipe.model_copy(deep=True)
    deeper.model.language_model.config["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match=r"\(model.language_model.config.num_hidden_layers: 2 then, 3 now\)"):
        run_recipe(deeper, resume=True)
    faster = recipe.model_copy(deep=True)
    faster.stages[0].num_workers, faster.stages[0].log_every = 1, 2
    assert run_recipe(faster, resume=True).is_dir()


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"packing": True, "group_by_length": True}, ConfigError, r"stages\.sft: packing and group_by_length exclude"),
        ({"engine": "zero9"}, ConfigError, r"stages\.sft\.engine"),
        ({"kind": "grpo"}, ConfigError, r"stages\.sft\.options\.rewards: a grpo stage needs a reward"),
        ({"data": "no-such-mixture"}, ConfigError, r"stages\.sft\.data: unknown mixture or dataset 'no-such-mixture'"),
        ({"learn": {"connectr": 1e-3}}, ConfigError, "did you mean 'connector'"),
        ({"max_length": 8}, DataError, "100 samples one after another cannot be used"),
    ],
)
def test_wrong_stages_are_refused_with_the_path_to_the_key(tmp_path, stage, error, message):
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 1, **stage}])
    with pytest.raises(error, match=message):
        run_recipe(recipe)


def test_a_stage_on_stored_features_learns_what_the_live_one_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    stage = {"name": "align", "epochs": 2, "learn": {"connector": 1e-2}, "log_every": 1}
    run_recipe(make_recipe(tmp_path, stages=[stage], rows=12), output=tmp_path / "live")
    cached = make_recipe(tmp_path, stages=[{**stage, "cache_features": True, "num_workers": 1}])
    run_recipe(cached, output=tmp_path / "cached")
    for a, b in zip(metrics(tmp_path / "live"), metrics(tmp_path / "cached"), strict=True):
        assert a["data"] == b["data"]
        assert abs(float.fromhex(a["loss"]) - float.fromhex(b["loss"])) < 1e-5
    shards = sorted((tmp_path / "cache").rglob("*.data"))
    assert len(shards) == 2
    run_recipe(cached, output=tmp_path / "again")
    assert sorted((tmp_path / "cache").rglob("*.data")) == shards
    learning = make_recipe(tmp_path, stages=[{**stage, "cache_features": True, "learn": {"encoders": 1e-5}}])
    with pytest.raises(ConfigError, match=r"stages\.align\.cache_features: encoders\.(semantic|detail) learns"):
        run_recipe(learning, output=tmp_path / "refused")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_in_four_bits_learns_by_its_adapter_and_goes_on_bit_equal(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    learn = {"language_model": {"lr": 1e-2, "lora": {"r": 4, "bits": 4}}, "connector": 1e-3}
    recipe = make_recipe(tmp_path, stages=[{"name": "sft", "steps": 4, "dtype": dtype, "learn": learn}])
    run_recipe(recipe, output=tmp_path / "whole")
    run_recipe(recipe, output=tmp_path / "cut", stop_after=2)
    run_recipe(recipe, output=tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
    assert not [name for name in state if "quant" in name or "lora" in name]
    zero = recipe.model_copy(deep=True)
    zero.stages[0].engine = "zero2"
    with pytest.raises(ConfigError, match="4-bit weights and ZeRO"):
        run_recipe(zero, output=tmp_path / "zero")
