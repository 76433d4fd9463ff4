"""Do the large recipes run on the fast road with as many samples a step as their papers?"""

from __future__ import annotations

import pytest

from mllm.recipe import load_recipe
from mllm.train.preflight.plan import ROOM, plan_recipe

PUBLISHED = {  # GPUs the recipe is written for, samples of an optimizer step by stage
    "llava_1_5": (8, {"pretrain": 256, "sft": 128}),
    "prismatic_dinosiglip": (8, {"sft": 128}),
    "siglip2_dinov3": (8, {"pretrain": 256, "sft": 128}),
    "c_radio": (8, {"pretrain": 256, "sft": 128}),
    "cambrian_8b": (64, {"pretrain": 512, "sft": 512}),
    "eagle_x3": (32, {"pretrain": 256, "sft": 128}),
}
MOVA = {"adapter": 1024, "sft": 128, "route": 512}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_recipe_packs_and_compiles_and_keeps_its_samples_a_step(name):
    gpus, samples = PUBLISHED[name]
    stages = load_recipe(name).stages
    assert {stage.name: stage.samples_per_step for stage in stages} == samples
    for stage in stages:
        assert stage.packing and stage.compile and stage.engine == "auto" and not stage.gradient_checkpointing
        assert stage.samples_per_step % (stage.batch_size * gpus) == 0


def test_mova_is_not_packed_and_keeps_its_samples_too():
    """Its router reads one question a row, and two samples a GPU do not fill a row of 4096."""
    stages = load_recipe("mova").stages
    assert {s.name: 64 * s.batch_size * s.gradient_accumulation for s in stages} == MOVA
    assert {stage.engine for stage in stages} == {"auto"} and not any(stage.packing for stage in stages)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_large_recipe_fits_the_gpus_it_is_written_for(name):
    plan = plan_recipe(load_recipe(name), processes=PUBLISHED[name][0], with_data=False, gpu_memory=80e9)
    for stage in plan.stages:
        print(name, stage.name, stage.engine, f"{stage.peak / 1e9:.1f} GB")
        assert stage.engine in ("none", "zero1", "zero2") and stage.peak <= ROOM * 80e9
