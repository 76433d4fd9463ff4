"""Do the chart recipes that tune CLIP by contrast read what they ask of their data?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from mllm.data.lookup import load_mixture
from mllm.data.sources import open_source
from mllm.recipe import load_recipe
from mllm.train.stages.contrastive.stage import check_contrastive


@pytest.mark.parametrize(("name", "negatives"), [("align", 0), ("vision4chart", 1), ("cprd", 4)])
def test_a_row_as_the_recipe_describes_it_has_the_pair_and_its_negatives(tmp_path, name, negatives):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"img_path": "a.png", "caption": "The bar of 2010 is 5.", "neg_caption": "The bar of 2010 is 6."}
    row |= {"negatives": ["It is 6.", "It is 7."], "negative_scores": [0.4, 0.2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    stage = load_recipe(name).stages[0]
    (item,) = load_mixture(stage.data).datasets
    dataset: Any = item.dataset
    sample = open_source(dataset.model_copy(update={"path": str(tmp_path / "rows.jsonl")}))[0]
    options = check_contrastive(stage)
    assert len(sample.images) == 1 and sample.turns[-1].content == row["caption"]
    assert options.num_negatives == negatives and bool(options.ranking_weight) == (name == "cprd")
    if negatives:
        assert sample.meta[options.negatives] == row[options.negatives]
    if options.ranking_weight:
        assert sample.meta[options.scores] == row["negative_scores"]
