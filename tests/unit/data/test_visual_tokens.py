"""Are rows of a dataset with `visual_tokens` seen so, in one batch with others, and as a model is later asked at that number?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.data.collate import collate
from mllm.data.mixture import Mixture
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec, MixtureSpec
from mllm.errors import ConfigError
from mllm.models.budgets import at_tokens
from mllm.processing.chat import count_tokens, encode_sample
from mllm.recipe import StageSpec
from mllm.train.data import refuse_fixed_tokens
from tests.helpers import picture, tiny_model

VIEWS: list[dict[str, Any]] = [
    {"type": "tiles", "dialect": "internvl", "max_tiles": 6},
    {"type": "tiles", "dialect": "internvl", "max_tiles": 6, "max_sample_tokens": 400},
]


def written(folder: Path) -> str:
    picture(1, size=(120, 40)).save(folder / "a.png")
    rows = [
        {
            "id": "0",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}],
        }
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / "rows.json")


@pytest.mark.parametrize("views", VIEWS)
def test_a_dataset_says_how_many_tokens_its_pictures_take(tmp_path: Path, views: dict[str, Any]) -> None:
    model, processor = tiny_model(tmp_path, views=views)
    model.eval()
    path = written(tmp_path)
    free, bound = (
        open_source(DatasetSpec(name="d", format="llava", path=path, visual_tokens=most)) for most in (None, 48)
    )
    assert free.reading != bound.reading  # so that a table of lengths is not taken for the other's
    assert "visual_tokens" not in free.reading
    encoded = [encode_sample(processor, source[0]) for source in (free, bound)]
    count = [int((sample.input_ids == processor.image_token_id).sum()) for sample in encoded]
    assert count[1] <= 48 < count[0]
    assert [count_tokens(processor, source[0], where="d") for source in (free, bound)] == [len(one) for one in encoded]
    assert encoded[1].extras["image_sizes"].tolist() == [[40, 120, 48]]
    with torch.no_grad():
        both = model(**collate(encoded, pad_token_id=0).inputs).logits
        alone = [model(**collate([one], pad_token_id=0).inputs).logits for one in encoded]
        with at_tokens(model, processor, 48):
            asked = encode_sample(processor, free[0])
            there = model(**collate([asked], pad_token_id=0).inputs).logits
    assert torch.equal(asked.input_ids, encoded[1].input_ids)
    torch.testing.assert_close(there, alone[1], atol=1e-6, rtol=0)
    for row, one in enumerate(alone):
        torch.testing.assert_close(both[row, : one.shape[1]], one[0], atol=1e-5, rtol=0)
    assert not torch.allclose(alone[0][0, -1], alone[1][0, -1], atol=1e-4)  # it is seen otherwise


def test_where_the_number_is_fixed_it_is_refused_by_name(tmp_path: Path) -> None:
    spec = DatasetSpec(name="d", format="llava", path=written(tmp_path), visual_tokens=48)
    mixture = Mixture(MixtureSpec.model_validate({"datasets": [{"dataset": spec}]}))
    stage = StageSpec.model_validate({"name": "s", "learn": {"connector": 1e-3}, "data": "d", "steps": 1})
    _, whole = tiny_model(tmp_path / "whole")
    with pytest.raises(
        ConfigError, match=r"stages.s.data: d: visual_tokens 48: with model.views single a picture always"
    ):
        refuse_fixed_tokens(stage, mixture, whole)
    _, tiled = tiny_model(tmp_path / "tiled", views=VIEWS[0])
    refuse_fixed_tokens(stage, mixture, tiled)
    with pytest.raises(ConfigError, match="stored for one way of seeing"):
        refuse_fixed_tokens(stage.model_copy(update={"cache_features": True}), mixture, tiled)
