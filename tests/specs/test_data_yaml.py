"""Is every shipped dataset and mixture readable, complete about its licence, and used as it is named?"""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm import assets
from mllm.config import read_yaml
from mllm.data.lookup import load_dataset, load_mixture
from mllm.data.spec import DatasetSpec
from mllm.recipe import ALONE

ROOT = Path(__file__).resolve().parents[2]
DATASETS = sorted((ROOT / "data/datasets").glob("*.yaml"))
MIXTURES = sorted((ROOT / "data/mixtures").glob("*.yaml"))
RECIPES = [p for p in sorted((ROOT / "recipes").glob("*.yaml")) if "language_model" in read_yaml(p)["model"]]
"""Those of whole models: a visual tokenizer alone trains on bare pictures."""

DRAWN_HERE = ("runs/demo", "runs/unified_demo", "runs/charts", "runs/segmentation_demo", "runs/stamps")
"""Folders of datasets that are made here, not downloaded."""


def test_there_is_something_to_test():
    assert len(DATASETS) >= 8 and len(MIXTURES) >= 4
    assert len(RECIPES) >= 5
    assert {path.stem for path in DATASETS} <= set(assets.available("data/datasets"))


@pytest.mark.parametrize("path", DATASETS, ids=lambda p: p.stem)
def test_a_dataset_says_where_it_is_from_and_under_which_licence(path):
    spec = load_dataset(path.stem)
    assert spec.name == path.stem and spec.description and spec.homepage
    assert spec.licence != "unknown" and spec.image_licence != "unknown"
    assert path.read_text().startswith("# "), "a header says what it is and how to get it"
    if spec.hub is not None:
        assert spec.revision is not None and len(spec.revision) == 40, "a hub reference is pinned"
    elif not spec.path.startswith(DRAWN_HERE):  # type: ignore[union-attr]
        assert spec.download and spec.path.startswith("$MLLM_DATA/")  # type: ignore[union-attr]
    assert path.stem in (ROOT / "data/README.md").read_text()


@pytest.mark.parametrize("path", MIXTURES, ids=lambda p: p.stem)
def test_a_mixture_names_datasets_that_exist(path):
    mixture = load_mixture(path.stem)
    assert mixture.name == path.stem and mixture.description
    assert all(isinstance(item.dataset, DatasetSpec) for item in mixture.datasets)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipes_data_can_be_resolved(path):
    for stage in read_yaml(path)["stages"]:
        if stage.get("kind") in ALONE:  # bare pictures
            continue
        assert load_mixture(stage["data"]).datasets


def test_names_of_mixtures_and_datasets_differ():
    assert not {p.stem for p in DATASETS} & {p.stem for p in MIXTURES}
