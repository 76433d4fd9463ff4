"""What is ``engine: auto`` on the GPUs that a run was started on?"""

from __future__ import annotations

import torch

from mllm import distributed, progress
from mllm.errors import ConfigError
from mllm.recipe import Recipe
from mllm.train.gpu_memory import usable_memory
from mllm.train.preflight.plan import plan_recipe


def choose_engines(recipe: Recipe) -> None:
    """Say of every stage with ``engine: auto`` what it is here: the engine that shares least and whose planned memory fits
    the smallest GPU of the run (of one that other programs fill, what they leave). One process, or processes without GPUs, share
    nothing. All processes must call it.

    Raises `ConfigError` for a recipe without a language model.
    """
    stages = [stage for stage in recipe.stages if stage.engine == "auto"]
    if not stages:
        return
    if recipe.model.language_model is None:
        raise ConfigError(
            f"stages.{stages[0].name}.engine: auto plans models with a language model; name one: none, zero1 or zero2"
        )
    processes = distributed.world_size()
    if processes == 1 or not torch.cuda.is_available():
        return
    memory = min(distributed.gather_objects(usable_memory()))
    chosen = {}
    if distributed.is_main():
        with progress.phase("choosing engines"):
            plan = plan_recipe(recipe, processes=processes, with_data=False, gpu_memory=memory)
        chosen = {stage.name: stage.engine for stage in plan.stages if stage.engine}
    chosen = distributed.gather_objects(chosen)[0]
    for stage in stages:
        stage.choose_here(chosen[stage.name])
        progress.tell(
            f"stage {stage.name}: engine {chosen[stage.name]} (auto: {memory / 1e9:.0f} GB, {processes} GPUs)"
            + ("" if stage.compiles_here == stage.compile else "; compile is off, which zero3 does not go with")
        )
