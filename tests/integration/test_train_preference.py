"""Do TRL's own DPO and GRPO trainers train our model class with pictures, launched by a recipe stage?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mllm.errors import CheckpointError, ConfigError
from mllm.train import run_recipe
from mllm.train.stages.kind import kind_of
from mllm.train.stages.preference.stage import as_row, check_preference, load_reward
from mllm.types import IMAGE_MARK, Sample, Turn
from tests.helpers import picture
from tests.integration.train_helpers import make_recipe, on_machines

pytestmark = pytest.mark.xdist_group("trl")  # it imports slowly: once


def character_sum(completions, target, meta, **columns):
    """A reward that differs between completions, and sees what the data say."""
    assert len(completions) == len(target) == len(meta) and all("rejected" in m for m in meta)
    return [float(sum(map(ord, c[-1]["content"])) % 97) for c in completions]


def _recipe(folder, kind, options, **stage):
    make_recipe(folder, rows=9)
    path = folder / "data" / "mixed.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "rejected": "it is not here"} for row in rows]))
    common = {"name": kind, "kind": kind, "steps": 2, "batch_size": 2, "schedule": {"type": "constant", "warmup": 0}}
    return make_recipe(folder, stages=[{**common, "options": options, **stage}])


def _records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dpo_moves_towards_the_chosen_answers_and_goes_on_after_an_interruption(tmp_path):
    learn = {"language_model": {"lr": 1e-2, "lora": {"r": 4}}, "connector": 1e-3}
    recipe = _recipe(tmp_path, "dpo", {"beta": 0.5}, steps=6, learn=learn, save_every=2, batch_size=4)
    run_recipe(recipe, stop_after=3)
    assert not (tmp_path / "run" / "final").exists()
    half = tmp_path / "run" / "checkpoints" / "dpo" / "checkpoint-5"
    half.mkdir()  # what a kill while saving leaves: it must not be gone on from
    (half / "trainer_state.json").write_text("{")
    final = run_recipe(recipe, resume=True)
    records = _records(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[0]["loss"] == pytest.approx(0.6931, abs=2e-3), "at the start the model is its own reference"
    assert records[-1]["loss"] < 0.6 and records[-1]["rewards/margins"] > 0.1
    assert set(records[0]["lr"]) == {"language_model", "connector"}
    state = load_file(final / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in state)
    assert (final / "adapters.safetensors").is_file()


@pytest.mark.slow
def test_grpo_draws_scores_and_learns_with_two_encoders_and_a_reference(tmp_path):
    rewards = ["tests.integration.test_train_preference:character_sum", "mllm.eval.metrics.relaxed:RelaxedStripped"]
    options = {
        "rewards": rewards,
        "num_generations": 2,
        "max_completion_length": 4,
        "beta": 0.1,
        "trl": {"temperature": 1.1},
    }
    final = run_recipe(_recipe(tmp_path, "grpo", options))
    records = _records(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2] and max(r["reward_std"] for r in records) > 0
    assert max(r["grad_norm"] for r in records) > 0 and "kl" in records[-1]
    assert {"rewards/character_sum/mean", "rewards/RelaxedStripped/mean"} <= set(records[0])
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    state = MllmForConditionalGeneration.from_pretrained(final).state_dict()
    before = MllmForConditionalGeneration.from_pretrained(tmp_path / "run" / "references" / "grpo").state_dict()
    moved = {
        key.split(".")[-2 if key.startswith("lm_head") else 1] for key in state if (state[key] != before[key]).any()
    }
    assert moved == {"language_model", "multi_modal_projector", "lm_head"}, "frozen encoders stay"


def _alone_and_together(folder):
    """DPO's recipe for one process, and the same for two of half the batch."""
    calm = {"steps": 2, "optimizer": {"eps": 1e-4}, "learn": {"language_model": 1e-3, "connector": 1e-3}}
    one = _recipe(folder, "dpo", {"beta": 0.5}, batch_size=4, **calm)
    two = _recipe(folder, "dpo", {"beta": 0.5}, batch_size=2, **calm)
    for recipe in (one, two):
        recipe.model.language_model.config["attention_dropout"] = 0.0
    return one, two


def _learned_alike(one, two):
    """One process's run and the first stage of several processes': their records, compared, and their weights."""
    wanted, found = _records(one), _records(two)
    for a, b in zip(wanted, found):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5) and a["lr"] == b["lr"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    states = (load_file(run / "dpo" / "model.safetensors") for run in (one, two))
    assert max((a - b).abs().max().item() for a, b in zip(*(s.values() for s in states))) < 1e-5
    return found


@pytest.mark.slow
def test_two_machines_prefer_what_one_process_does(tmp_path):
    """Two pairs a machine, each in a folder of its own, and one step of four pairs: the same losses."""
    one, two = _alone_and_together(tmp_path)
    run_recipe(one, output=tmp_path / "one")
    own = tmp_path / "two", tmp_path / "other"
    assert on_machines([two] * 2, *own) == [None, None]
    assert [(r["stage"], r["step"]) for r in _learned_alike(tmp_path / "one", own[0])] == [("dpo", 1), ("dpo", 2)]
    assert (own[1] / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.nightly
def test_two_machines_prefer_what_one_process_does_and_draw_for_the_next_stage(tmp_path):
    """Also of one machine that goes on alone, and where one lost a file meanwhile; then GRPO goes on from there."""
    one, two = _alone_and_together(tmp_path)
    options = {"rewards": [f"{__name__}:character_sum"], "num_generations": 2, "max_completion_length": 3}
    draw = {"name": "grpo", "kind": "grpo", "steps": 1, "batch_size": 2, "options": options}
    two.stages.append(type(two.stages[0]).model_validate(two.stages[0].model_dump() | draw))
    two.stages[0].save_every = 1
    run_recipe(one, output=tmp_path / "one")
    own = tmp_path / "two", tmp_path / "other"
    assert on_machines([two] * 2, *own, stop_after=1) == [None, None]
    alone = Path(shutil.copytree(own[0], tmp_path / "alone"))
    here, there = (folder / "checkpoints" / "dpo" / "checkpoint-1" for folder in own)
    kept = (here / "optimizer.pt").read_bytes()
    (there / "optimizer.pt").unlink()
    (alone / "checkpoints" / "dpo" / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-1: optimizer.pt is missing \(machine \d \(.*wrote it"):
        run_recipe(one, output=alone, resume=True)
    (alone / "checkpoints" / "dpo" / "checkpoint-1" / "optimizer.pt").write_bytes(kept)
    run_recipe(one, output=alone, resume=True)
    assert _records(alone)[-1]["loss"] == pytest.approx(_records(tmp_path / "one")[-1]["loss"], abs=2e-5)
    assert on_machines([two] * 2, *own, resume=True) == [None, None]
    assert all((folder / "final" / "model.safetensors").is_file() for folder in own)
    found = _learned_alike(tmp_path / "one", tmp_path / "two")
    assert [(r["stage"], r["step"]) for r in found] == [("dpo", 1), ("dpo", 2), ("grpo", 1)]
    assert found[-1]["reward_std"] > 0 and (tmp_path / "two" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_frozen_encoder_with_batch_norms_goes_with_bfloat16(tmp_path, kind):
    """Its weights were bf16 and its statistics float32, which no kernel takes."""
    rewards = {"rewards": [f"{__name__}:character_sum"], "num_generations": 2, "max_completion_length": 3, "beta": 0.1}
    recipe = _recipe(tmp_path, kind, {"beta": 0.5} if kind == "dpo" else rewards, steps=1, dtype="bfloat16")
    options = {"stem_type": "", "stem_width": 8, "channels": [8, 8, 16, 16]}
    net = {"type": "timm", "architecture": "resnet10t", "options": options, "image_size": 32, "layers": [-1]}
    recipe.model.encoders = (
        type(recipe.model).model_validate(recipe.model.model_dump() | {"encoders": {"a": net}}).encoders
    )
    state = load_file(run_recipe(recipe) / "model.safetensors")
    assert len(_records(tmp_path / "run")) == 1
    assert {value.dtype for key, value in state.items() if "running_" in key} == {torch.bfloat16}


def write_clips(folder, count=6):
    """Questions of VSI-Bench's two kinds about clips of 3 to 8 frames."""
    (folder / "data").mkdir(parents=True)
    rows = []
    for number in range(count):
        clip, (kind, answer) = f"{number}.npy", (("object_counting", "4"), ("object_rel_distance", "A"))[number % 2]
        np.save(folder / "data" / clip, np.stack([np.asarray(picture(9 * number + k)) for k in range(3 + number)]))
        content = [{"type": "video", "video": {"path": clip, "fps": 2}}, {"type": "text", "text": "how many?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "question_type": kind}))
    (folder / "data" / "mixed.jsonl").write_text("\n".join(rows))
    return {"format": "messages", "path": str(folder / "data" / "mixed.jsonl")}


def vowels(completions, **columns):
    """A reward that a model from scratch differs in."""
    return [len(set(c[-1]["content"]) & set("aeiou0123456789")) / 4 for c in completions]


@pytest.mark.slow
def test_grpo_by_clips_goes_on_bit_for_bit_after_an_interruption(tmp_path):
    """VSI-Bench's rule beside another reward, two encoders with frames of their own, and a run that was stopped between steps."""
    rewards = ["mllm.eval.metrics.vsibench:VsiBenchReward", f"{__name__}:vowels"]
    options = {"rewards": rewards, "num_generations": 2, "max_completion_length": 4, "beta": 0.04}
    stage = {"name": "grpo", "kind": "grpo", "steps": 4, "batch_size": 4, "options": options, "save_every": 2}
    model = {"video": {"frames": 4, "fewer": {"detail": 2}, "stamp": "{seconds:.1f} "}}
    recipe = make_recipe(tmp_path, stages=[{**stage, "data": write_clips(tmp_path)}], model=model, rows=1)
    recipe.model.language_model.config["attention_dropout"] = 0.0
    whole = run_recipe(recipe, output=tmp_path / "whole")
    run_recipe(recipe, output=tmp_path / "cut", stop_after=2)
    cut = run_recipe(recipe, output=tmp_path / "cut", resume=True)
    records = _records(tmp_path / "whole")
    assert [r["step"] for r in records] == [1, 2, 3, 4] and max(r["grad_norm"] for r in records) > 0
    assert {"rewards/VsiBenchReward/mean", "rewards/vowels/mean", "kl"} <= set(records[0])
    kept = ("loss", "grad_norm", "reward", "kl", "completions/mean_length")
    assert [[r[k] for k in kept] for r in records] == [[r[k] for k in kept] for r in _records(tmp_path / "cut")]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_rewards_come_by_dotted_name_as_functions_or_scoring_rules():
    relaxed = load_reward("mllm.eval.metrics.relaxed:RelaxedStripped", where="x")
    said = [[{"role": "assistant", "content": text}] for text in ("10.4", "11", "")]
    assert relaxed(completions=said, target=["10"] * 3, meta=[{}] * 3) == [1.0, 0.0, 0.0]
    spatial = load_reward("mllm.eval.metrics.vsibench:VsiBenchReward", where="x")
    kind = {"question_type": "object_counting"}
    found = spatial(completions=["<answer>4</answer>", "none"], target=["5", "5"], meta=[kind] * 2)
    assert found[0] == pytest.approx(0.6, abs=0.11) and found[1] == 0.0
    assert load_reward(f"{__name__}:character_sum", where="x") is character_sum
    with pytest.raises(ConfigError, match="did you mean 'RelaxedStripped'"):
        load_reward("mllm.eval.metrics.relaxed:RelaxedStriped", where="x")


def test_a_row_keeps_images_where_the_conversation_has_them():
    images = [picture(0), picture(1)]
    turns = [
        Turn("user", "hello"),
        Turn("assistant", "hi"),
        Turn("user", f"{IMAGE_MARK} or {IMAGE_MARK}?"),
        Turn("assistant", "b"),
    ]
    stage = make_stage("dpo", {})
    processor = SimpleNamespace(image_processor=SimpleNamespace(max_pixels=None))
    row = as_row(Sample("1", turns, images, "d", {"rejected": "a"}), "dpo", check_preference(stage), processor)
    assert [[p["type"] for p in m["content"]] for m in row["prompt"]] == [
        ["text"],
        ["text"],
        ["image", "text", "image", "text"],
    ]
    assert row["chosen"][0]["content"] == "b" and row["rejected"][0]["content"] == "a" and len(row["images"]) == 2


def make_stage(kind, options, **changes):
    from mllm.recipe import StageSpec

    common = {"name": "s", "kind": kind, "steps": 1, "learn": {"connector": 1e-3}, "data": "x", "options": options}
    return StageSpec.model_validate({**common, **changes})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (("grpo", {}), "a grpo stage needs a reward"),
        (("dpo", {"rewards": ["a:b"]}), "has no rewards"),
        (("grpo", {"rewards": ["nonsense"]}), "package.module:name"),
        (("dpo", {"bet": 1}), "did you mean 'beta'"),
        (("dpo", {"trl": {"learning_rate": 1}}), "set from the stage's own keys"),
        (("dpo", {}, {"packing": True}), "has no packing"),
        (("dpo", {}, {"save_in_background": True}), "has no save_in_background"),
        (("dpo", {}, {"engine": "zero2"}), "TRL runs DeepSpeed itself"),
    ],
)
def test_settings_a_preference_stage_cannot_have_are_told_first(stage, message):
    kind, options, *changes = stage
    with pytest.raises(ConfigError, match=message):
        stage = make_stage(kind, options, **(changes[0] if changes else {}))
        kind_of(stage).check_options(stage)
