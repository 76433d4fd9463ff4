"""Does every shipped recipe parse, join and build, at the sizes it claims?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm import assets
from mllm.config import read_yaml
from mllm.errors import ConfigError, UnknownName
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import ALONE, Recipe, load_recipe
from mllm.recipe_of_stage import parts_of_run, recipe_of_stage
from mllm.train.preflight.plan import plan_recipe
from mllm.train.preflight.tokenizer_plan import plan_tokenizer

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml") if "language_model" in read_yaml(p)["model"])
"""Recipes of whole models; those of a visual tokenizer alone are built in its own tests."""

# recipe → visual tokens per image, parameters in millions: language model, connector, all encoders
SIZES = {
    "llava_1_5": (576, 6738, 21.0, 291),
    "prismatic_dinosiglip": (729, 6738, 71.4, 700),
    "eagle_x3": (1024, 6738, 34.6, 1447),
    "cambrian_8b": (600, 8030, None, None),
    "siglip2_dinov3": (576, 7616, 20.6, None),
    "unit": (1024, 6738, 22.0, 637),
    "come_vl": (144, 7616, None, None),
    "spatial_mllm": (144, 3086, 323.0, None),
    "pvc": (4 * 64, 7616, 80.1, 362),
    "merv": (64, 6738, None, 748),
    "slow_fast": (324, 7616, 23.9, 843),
    "c_radio": (576, 7616, None, None),
    "llava_next": (2928, 6738, 21.0, 291),
    "infllava": (576, 8030, 25.4, 291),
    "falcon": (640, 8030, 21.0, None),
    "eve": (601, 6738, 21.0, 9.0),
    "solo": (1024 + 31 + 2, 7242, 12.6, None),
    "siglip2_tiles_dinov3": (2928, 7616, None, None),
}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7
    assert set(SIZES) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_on_the_meta_device(name: str) -> None:
    recipe = load_recipe(str(FOLDER / f"{name}.yaml"))
    assert recipe.description, "the recipe table shows the description"
    config = build_config(recipe.model)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    parts: dict[str, int] = {}
    for parameter_name, parameter in model.named_parameters():
        part = model.part_of(parameter_name).partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    for stage in recipe_of_stage(recipe, recipe.stages[-1], Path("run")).stages:
        for part in stage.learning():
            assert any(known == part or known.startswith(f"{part}.") for known in model.part_prefixes()), (
                f"{stage.name}: {part}"
            )
    for data in {stage.data for stage in recipe.stages if isinstance(stage.data, str)}:
        known = {**assets.available("data/datasets"), **assets.available("data/mixtures")}
        assert data in known, f"{name}: data {data!r} is not declared under data/"
    for task in recipe.evaluation.tasks:
        assert task in {**assets.available("eval/tasks"), **assets.available("eval/suites")}, task
    rules = config.layout_rules()
    layout = rules.layout(rules.largest())
    if name in SIZES:
        tokens, language_model, connector, encoders = SIZES[name]
        assert layout.num_tokens == tokens
        assert parts["language_model"] / 1e6 == pytest.approx(language_model, rel=0.005)
        if connector is not None:
            assert parts["connector"] / 1e6 == pytest.approx(connector, rel=0.01)
        if encoders is not None:
            assert parts["encoders"] / 1e6 == pytest.approx(encoders, rel=0.02)
    # shapes of every join: one picture through encoders and connector, without memory
    with torch.device("meta"):
        pixels = {}
        for n, info in config.encoder_infos().items():
            one = (
                (3, info.image.height, info.image.width)
                if layout.patches is None
                else (3 * (info.image.patch or 0) ** 2,)
            )
            rows = layout.rows_of(n) // rules.view.frames  # a picture by itself, where frames are taken together
            pixels[n] = torch.zeros(rows, *one)
        weights = torch.zeros(1, len(config.router["experts"])) if config.router else None
        if weights is None:
            visual, _ = model.model.encode_images(pixels, image_sizes=[rules.largest()] if rules.needs_size else None)
            width = config.get_text_config().hidden_size + rules.view.beside
            assert tuple(visual.shape) == (layout.num_placeholders, width)


def test_a_wrong_key_names_its_path_and_what_was_meant(tmp_path: Path) -> None:
    text = (FOLDER / "llava_1_5.yaml").read_text()
    assert "    batch_size: 2\n" in text
    (tmp_path / "a.yaml").write_text(text.replace("    batch_size: 2\n", "    bach_size: 2\n", 1))
    with pytest.raises(
        ConfigError,
        match=r"a.yaml.stages.pretrain.bach_size: unknown key, did you mean 'batch_size'\? Known keys: .*\.$",
    ):
        load_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(
        ConfigError, match=r"yaml.data: unknown key; it is a key of stages: stages.<name>.data. Known keys: name"
    ):
        load_recipe("llava_1_5", ["data=mine.json"])
    with pytest.raises(ConfigError, match=r"encoders: unknown key; it is a key of model: model.encoders. Known"):
        load_recipe("llava_1_5", ["encoders=clip-vit-l-14"])
    with pytest.raises(ConfigError, match=r"qqq: unknown key. Known"):
        load_recipe("llava_1_5", ["qqq=1"])
    with pytest.raises(UnknownName, match="unknown recipe 'llava_15', did you mean 'llava_1_5'"):
        load_recipe("llava_15")
    (tmp_path / "b.yaml").write_text(text.replace("clip-vit-l-14-336", "clip-vit-l-14-366"))
    with pytest.raises(ConfigError, match="did you mean 'clip-vit-l-14-336'"):
        build_config(load_recipe(str(tmp_path / "b.yaml")).model)


def test_overrides_reach_stages_by_name() -> None:
    recipe = load_recipe("llava_1_5", ["stages.sft.batch_size=2", "stages.0.learn.connector=5e-4", "seed=3"])
    assert recipe.stages[1].batch_size == 2 and recipe.stages[0].learn["connector"] == 5e-4 and recipe.seed == 3
    with pytest.raises(ConfigError, match=r"override stages\.stf: no such item, did you mean 'sft'"):
        load_recipe("llava_1_5", ["stages.stf.batch_size=2"])


def test_a_stage_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="exactly one of epochs and steps"):
        load_recipe("llava_1_5", ["stages.sft.steps=10"])
    with pytest.raises(ConfigError, match=r"learn.connector is 0.0; a rate is positive"):
        load_recipe("llava_1_5", ["stages.sft.learn.connector=0.0"])
    assert Recipe.model_json_schema()["properties"]["stages"]


def test_one_recipe_may_train_a_tokenizer_and_the_model_on_it(tmp_path: Path) -> None:
    recipe = load_recipe("focus")
    first, second = parts_of_run(recipe, tmp_path)
    assert [stage.name for stage in first.stages] == ["tokenizer", "decoder"] and first.model.language_model is None
    assert [stage.name for stage in second.stages] == ["understanding", "segmentation", "editing", "joint"]
    assert second.model.visual_tokenizer["weights"] == str(
        tmp_path / "decoder"
    )  # the tokenizer, and the decoder beside it
    assert {**second.model.visual_tokenizer, "weights": None} == {**first.model.visual_tokenizer, "weights": None}
    assert recipe_of_stage(load_recipe("llava_1_5"), load_recipe("llava_1_5").stages[0], tmp_path).name == "llava_1_5"


@pytest.mark.nightly
def test_both_halves_of_such_a_recipe_are_planned(tmp_path: Path) -> None:
    first, second = parts_of_run(load_recipe("focus"), tmp_path)
    parts = plan_tokenizer(first, processes=8, with_data=False).parameters
    assert sum(n for part, n in parts.items() if part.startswith("diffusion_decoder.network")) / 1e9 == pytest.approx(
        2.57, rel=0.01
    )
    planned = plan_recipe(second, processes=8, with_data=False)
    assert [stage.name for stage in planned.stages] == [stage.name for stage in second.stages]
    assert planned.parameters["encoders.whole"] / 1e6 == pytest.approx(676, rel=0.01)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["sft", "tokenizer"], "come first"),
        (["tokenizer"], "at least one"),
        (["sft"], None),
    ],
)
def test_stages_of_the_tokenizer_come_first(order: list[str], words: str | None) -> None:
    data = read_yaml(FOLDER / "focus.yaml")
    made = {stage.get("kind", "sft"): stage for stage in data["stages"]}
    data = {**data, "name": "mixed", "stages": [made[kind] for kind in order]}
    if words is None:
        assert Recipe.model_validate(data).stages[0].kind not in ALONE
        return
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(data)
