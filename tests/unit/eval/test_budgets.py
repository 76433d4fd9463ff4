"""Does a model give as many visual tokens as it is told to, with its own weights, and does the table reach its card?"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mllm.errors import ConfigError
from mllm.eval.studies.budgets import run_budgets
from mllm.eval.studies.study import load_studies
from mllm.models.budgets import at_tokens, fitting_grid, most_tokens, what_gives_way
from mllm.models.card import model_card
from tests.helpers import TINY_CLIP, picture, tiny_model
from tests.unit.eval.test_runner import make_data

SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIGLIP2 |= {"num_attention_heads": 2, "num_patches": 16, "patch_size": 8}
LOOKUP = {"type": "lookupvit", "width": 16, "depth": 1, "num_heads": 2, "head_width": 8, "lookup_heads": 2}
LOOKUP |= {"lookup_head_width": 8, "patch_size": 7, "image_size": 28, "compressed_grid": [3, 3]}
NATIVE = {
    "encoders": {"eye": {"type": "hf", "architecture": SIGLIP2}},
    "connector": {"type": "linear"},
    "views": {"type": "native", "rule": "qwen", "max_patches": 30, "newlines": True},
}
CLIP: dict[str, Any] = {"encoders": {"eye": TINY_CLIP}, "connector": {"type": "linear"}}
KINDS: dict[str, tuple[dict[str, Any], int, dict[int, int]]] = {
    "tiles": (
        {**CLIP, "views": {"type": "tiles", "dialect": "internvl", "max_tiles": 4}},
        80, {80: 80, 50: 48, 20: 16},
    ),
    "native": (NATIVE, 60, {35: 34, 20: 20, 2: 2}),
    "resampler": ({**CLIP, "connector": {"type": "resampler", "num_queries": 6}}, 6, {6: 6, 3: 3, 1: 1}),
    "resampler with a grid": ({"connector": {"type": "resampler", "grid": [4, 4]}}, 16, {16: 16, 9: 9, 5: 4}),
    "average_pool": ({**CLIP, "connector": {"type": "average_pool", "grid": [4, 4]}}, 16, {16: 16, 15: 8, 4: 4}),
    "lookupvit": ({"encoders": {"eye": LOOKUP}, "connector": {"type": "mlp", "depth": 2}}, 9, {9: 9, 4: 4, 1: 1}),
}  # fmt: skip
"""Model, its most tokens, and budget → most tokens at it."""


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_every_budget_is_kept_to_with_the_models_own_weights_and_leaves_no_trace(name: str, tmp_path: Any) -> None:
    changes, most, budgets = KINDS[name]
    model, processor = tiny_model(tmp_path, **changes)
    assert most_tokens(model.config) == most and what_gives_way(model.config)
    config, images = model.config.to_json_string(), processor.image_processor.to_json_string()
    asked = {"text": ["<image> what?"], "images": [[picture(1, size=(64, 60))]], "return_tensors": "pt"}
    given = processor(**asked)
    before = model(**given).logits
    for budget, expected in budgets.items():
        with at_tokens(model, processor, budget) as largest:
            assert largest == expected <= budget
            inputs = processor(**asked)
            found = int((inputs["input_ids"] == processor.image_token_id).sum())
            assert found <= budget, "the processor writes what the model makes"
            logits = model(**inputs).logits
            assert logits.isfinite().all()
            if expected == most:
                torch.testing.assert_close(logits, before)
    assert model.config.to_json_string() == config and processor.image_processor.to_json_string() == images
    torch.testing.assert_close(model(**processor(**asked)).logits, before, atol=0, rtol=0)


def test_a_coarser_grid_of_queries_is_their_mean_and_fewer_are_the_first(tmp_path: Any) -> None:
    model, processor = tiny_model(tmp_path, connector={"type": "resampler", "grid": [2, 4]})
    queries = model.model.multi_modal_projector.queries.detach()
    with at_tokens(model, processor, 2):
        means = queries.view(2, 2, 2, -1).mean((0, 2))
        torch.testing.assert_close(model.model.multi_modal_projector.queries, means)
    model, processor = tiny_model(tmp_path, connector={"type": "resampler", "num_queries": 5})
    queries = model.model.multi_modal_projector.queries.detach()
    with at_tokens(model, processor, 3):
        torch.testing.assert_close(model.model.multi_modal_projector.queries, queries[:3])


def test_what_cannot_be_met_is_refused_and_leaves_no_trace(tmp_path: Any) -> None:
    model, processor = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="a number chosen afterwards have views tiles and native"):
        what_gives_way(model.config)
    model, processor = tiny_model(tmp_path, **NATIVE)
    config = model.config.to_json_string()
    with pytest.raises(ConfigError, match=r"1 visual tokens a picture: .*the smallest takes 2"):
        run_budgets(model, processor, [], tmp_path, tokens=[20, 1])
    assert model.config.to_json_string() == config
    model, processor = tiny_model(tmp_path, connector={"type": "resampler", "num_queries": 5})
    with (
        pytest.raises(ConfigError, match="9 visual tokens a picture: the resampler has 5 learned queries"),
        at_tokens(model, processor, 9),
    ):
        pass


def test_grids_keep_their_shape() -> None:
    assert fitting_grid((24, 24), 144) == (12, 12)
    assert fitting_grid((12, 24), 72) == (6, 12)
    assert fitting_grid((24, 24), 100) == (10, 10)
    assert fitting_grid((24, 24), 100, within=(24, 24)) == (8, 12)


def test_the_table_reaches_the_models_card(tmp_path: Any) -> None:
    model, processor = tiny_model(tmp_path / "tokenizer", **NATIVE)
    data = make_data(tmp_path / "data")
    said: list[str] = []
    options: dict[str, Any] = {"tokens": [20, 6, 12, 20], "data": {"demo_charts": data}, "progress": False}
    study = run_budgets(model, processor, ["demo_charts"], tmp_path / "run" / "eval", say=said.append, **options)
    (table,) = study.tables
    assert [row[1] for row in table.rows] == ["20", "12", "6"] and [row[6] for row in table.rows] == ["12"] * 3
    assert said == [f"[{k}/3] demo_charts: at most {n} visual tokens a picture" for k, n in ((1, 20), (2, 12), (3, 6))]
    means = [float(row[2]) for row in table.rows]
    assert means == sorted(means, reverse=True) and means[-1] <= 6
    file = tmp_path / "run" / "eval" / "budgets" / "6" / "demo_charts.jsonl"
    answers = file.read_text()
    file.write_text("\n".join(answers.splitlines()[:5]) + "\n")
    again = run_budgets(model, processor, ["demo_charts"], tmp_path / "run" / "eval", **options)
    assert again.tables == study.tables and len(file.read_text().splitlines()) == 12
    assert [found.name for found in load_studies(tmp_path / "run" / "eval")] == ["budgets"], "a report shows it"
    model.save_pretrained(tmp_path / "run" / "final")
    card = model_card(tmp_path / "run" / "final", "me/mine")
    kept = json.loads((tmp_path / "run" / "eval" / "budgets.json").read_text())["data"]["budgets"]
    for row, found in zip(table.rows, kept, strict=True):
        line = f"| demo_charts | {row[1]} | {row[2]} | {row[4]} | {found['low']:.2f} to {found['high']:.2f} | 12 | {found['rule']} |"
        assert line in card
