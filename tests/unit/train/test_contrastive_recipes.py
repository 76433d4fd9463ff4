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


def test_the_study_of_charts_has_the_three_ways_of_contrast_as_arms():
    from mllm.eval.studies.arms import load_arms

    arms, wanted = load_arms("real_charts").arms, {"O": (0, 0.0), "P": (4, 0.0), "Q": (4, 1.0)}
    for name, (negatives, ranking) in wanted.items():
        recipe = load_recipe(str(arms[name].recipe), arms[name].overrides)
        options = check_contrastive(recipe.stages[0])
        assert (options.num_negatives, options.ranking_weight) == (negatives, ranking)
        plain = load_recipe("real_charts")
        assert recipe.stages[1:] == plain.stages and recipe.model == plain.model
