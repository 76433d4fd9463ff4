"""What is ``engine: auto`` on the GPUs that a run was started on, and is a named ZeRO stage slower than it must be there?"""

from __future__ import annotations

import torch

from mllm import distributed, progress
from mllm.errors import ConfigError, MllmError
from mllm.recipe import Recipe
from mllm.train.gpu_memory import usable_memory
from mllm.train.preflight.plan import ROOM, RecipePlan, plan_recipe
from mllm.train.preflight.scaling import LADDER


def choose_engines(recipe: Recipe) -> None:
    """Say of every stage with ``engine: auto`` what it is here: the fastest (`LADDER`) whose planned memory fits the
    smallest GPU of the run (of one that other programs fill, what they leave). One process, or processes without GPUs, share nothing. Of
    a stage that names a slower ZeRO stage, say so. All processes must call it.

    Raises `ConfigError` for a recipe without a language model.
    """
    stages = [stage for stage in recipe.stages if stage.engine == "auto"]
    if stages and recipe.model.language_model is None:
        raise ConfigError(
            f"stages.{stages[0].name}.engine: auto plans models with a language model; name one: none, sharded, zero1 or zero2"
        )
    processes = distributed.world_size()
    shares = recipe.model.language_model is not None and any(stage.engine in _SHARING for stage in recipe.stages)
    if processes == 1 or not torch.cuda.is_available() or not (stages or shares):
        return
    memory = min(distributed.gather_objects(usable_memory()))
    chosen = {}
    if distributed.is_main():
        with progress.phase("choosing engines"):
            try:
                plan = plan_recipe(recipe, processes=processes, with_data=False, gpu_memory=memory)
            except MllmError:
                if stages:
                    raise
                plan = None  # what is wrong is told where it is met
        if plan is not None:
            chosen = {stage.name: stage.engine for stage in plan.stages if stage.engine}
            for line in slower_than_it_must_be(recipe, plan, processes=processes, memory=memory):
                progress.tell(line)
    chosen = distributed.gather_objects(chosen)[0]
    for stage in stages:
        stage.choose_here(chosen[stage.name])
        progress.tell(
            f"stage {stage.name}: engine {chosen[stage.name]} (auto: {memory / 1e9:.0f} GB, {processes} GPUs)"
            + ("" if stage.compiles_here == stage.compile else "; compile is off, which zero3 does not go with")
        )


_SHARING = ("zero1", "zero2", "zero3")


def slower_than_it_must_be(recipe: Recipe, plan: RecipePlan, *, processes: int, memory: float) -> list[str]:
    """A line for every stage that names a ZeRO stage where an engine that was measured faster has room. memory: bytes of a GPU."""
    lines = []
    for stage in plan.stages:
        named = next(s.engine for s in recipe.stages if s.name == stage.name)
        if named not in _SHARING or stage.memory_for is None:
            continue
        faster = LADDER[: LADDER.index("zero2" if named == "zero1" else named)]  # of two GPUs both did the same
        fits = [e for e in faster if e in stage.engines and stage.peak_for(e, processes) <= ROOM * memory]
        if fits:
            lines.append(
                f"! stage {stage.name}: engine {named} is slower than it must be: by the plan {fits[0]} takes "
                f"{stage.peak_for(fits[0], processes) / 1e9:.0f} of {memory / 1e9:.0f} GB here (engine: auto chooses it)"
            )
    return lines
