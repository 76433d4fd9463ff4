"""Does a micro-batch that is split to fit (``max_tokens_per_batch``) train what the whole one trains?"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest
from safetensors.torch import load_file

from mllm.data.dataset import DataStream
from mllm.data.mixture import Mixture
from mllm.data.plan import make_plan
from mllm.errors import ConfigError
from mllm.models.build import config_and_processor, load_tokenizer
from mllm.processing.chat import encode_sample
from mllm.train import run_recipe
from tests.integration.train_helpers import make_recipe, metrics, write_data

CALM = {"optimizer": {"eps": 1e-5}, "batch_size": 4, "gradient_accumulation": 2}


def _recipe(folder, *stages):
    defaults = {"steps": 3, **CALM}
    recipe = make_recipe(folder, stages=[{"name": f"s{k}", **defaults, **stage} for k, stage in enumerate(stages)])
    recipe.model.language_model.config["attention_dropout"] = 0.0
    return recipe


def _close(one, two, *, stage="s0"):
    """Two runs' records and weights are those of one and the same sums, rounded otherwise."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert {k: a[k] for k in ("data", "samples", "tokens", "supervised", "images")} == {
            k: b[k] for k in ("data", "samples", "tokens", "supervised", "images")
        }
        for key in ("loss", "grad_norm"):
            assert float.fromhex(a[key]) == pytest.approx(float.fromhex(b[key]), rel=2e-5)
    wanted, found = (load_file(folder / stage / "model.safetensors") for folder in (one, two))
    assert set(wanted) == set(found)
    assert max((wanted[name] - found[name]).abs().max().item() for name in wanted) < 1e-6


def _slots(output):
    """Tokens and padding that were computed, by step."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [round(record["tokens"] / record["fill"]) for record in records]


def test_a_split_batch_gives_the_gradient_of_the_whole_one_and_resumes_exactly(tmp_path):
    whole = _recipe(tmp_path, {})
    split = _recipe(tmp_path, {"max_tokens_per_batch": 160, "save_every": 1, "save_in_background": True})
    run_recipe(whole, output=tmp_path / "whole")
    run_recipe(split, output=tmp_path / "split")
    _close(tmp_path / "whole", tmp_path / "split")
    assert all(a < b for a, b in zip(_slots(tmp_path / "split"), _slots(tmp_path / "whole"), strict=True))
    run_recipe(split, output=tmp_path / "again", stop_after=1)
    run_recipe(split, output=tmp_path / "again", resume=True)
    assert metrics(tmp_path / "again") == metrics(tmp_path / "split")
    run_recipe(whole, output=tmp_path / "later", stop_after=1)  # as one that was then out of memory
    run_recipe(split, output=tmp_path / "later", resume=True)
    _close(tmp_path / "whole", tmp_path / "later")


@pytest.mark.nightly
def test_processes_of_which_one_splits_do_not_wait_for_each_other(tmp_path):
    """Of each step's four samples about one is long, so one of the two processes alone has more passes."""
    data = write_data(tmp_path / "data", rows=24)
    rows = json.loads(data.read_text())
    for row in rows[::4]:
        row["conversations"][1]["value"] = "it is long " * 30
    data.write_text(json.dumps(rows))
    engines = ("zero3", "zero2", "zero1", "none")
    common = {"steps": 2, "gradient_accumulation": 1}
    one = [{**common, "batch_size": 4} for _ in engines]
    two = [{**common, "batch_size": 2, "engine": engine, "max_tokens_per_batch": 160} for engine in engines]
    whole, split = _recipe(tmp_path, *one), _recipe(tmp_path, *two)
    assert _passes(split, rank=0) != _passes(split, rank=1)
    run_recipe(whole, output=tmp_path / "one")
    run_recipe(split, output=tmp_path / "two", processes=2)
    for k in range(len(engines)):
        _close(tmp_path / "one", tmp_path / "two", stage=f"s{k}")


def _passes(recipe, *, rank):
    """Forward passes of one of two processes in each step of the first stage."""
    stage = recipe.stages[0]
    processor = config_and_processor(recipe.model, load_tokenizer(recipe.model.text_model))[1]
    mixture = Mixture(stage.data, seed=recipe.seed)
    plan = make_plan(mixture, batch_size=stage.batch_size, world_size=2, total=8)
    encode = partial(encode_sample, processor, max_length=stage.max_length)
    stream = DataStream(plan, encode, pad_token_id=0, rank=rank, pad_to_multiple_of=8, max_tokens=160)
    return Counter(batch.position.batch for batch in stream)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_tokens_per_batch": 100},
            r"stages\.s0\.max_tokens_per_batch is 100, and one row may have max_length 160",
        ),
        ({"max_tokens_per_batch": 320, "packing": True}, r"stages\.s0\.max_tokens_per_batch: packed rows all have"),
    ],
)
def test_a_limit_that_cannot_hold_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe(_recipe(tmp_path, settings), output=tmp_path / "refused")
