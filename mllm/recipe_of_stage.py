"""Which recipe is a stage trained by, where one file trains a visual tokenizer, a decoder beside it and the model that draws with them?

Such a recipe is two in one run: its first stages (kinds ``tokenizer`` and ``diffusion``) are those of a visual tokenizer by itself, and
the others' model is built on the folder that the last of these wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import ConfigError
from mllm.recipe import ALONE, ModelSpec, Recipe, StageSpec, reader_of


def recipe_of_stage(recipe: Recipe, stage: StageSpec, output: Path) -> Recipe:
    """The recipe that a stage belongs to: ``recipe`` itself, but for one that trains a tokenizer and a model on it.

    Args:
        recipe: what a run trains.
        stage: one of its stages.
        output: the run's folder.

    Returns:
        For stages of the tokenizer: its settings and stages alone. For the others: the model with ``weights`` in that folder.
    """
    first = [one for one in recipe.stages if one.kind in ALONE]
    if not first or recipe.model.language_model is None:
        return recipe
    holder = reader_of(recipe.model.visual_tokenizer)
    if stage.kind in ALONE:
        alone = ModelSpec(visual_tokenizer=_settings(recipe.model, holder))
        return recipe.model_copy(update={"model": alone, "stages": first})
    weights = str(output / first[-1].name)
    if holder is None:
        changes: dict[str, Any] = {"visual_tokenizer": {**(recipe.model.visual_tokenizer or {}), "weights": weights}}
    else:
        encoder = recipe.model.encoders[holder]
        assert isinstance(encoder, dict), "a preset has no tokenizer to train"
        known = encoder.get("weights") or {}
        changes = {"encoders": {**recipe.model.encoders, holder: {**encoder, "weights": {**known, "source": weights}}}}
    rest = [one for one in recipe.stages if one.kind not in ALONE]
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes), "stages": rest})


def parts_of_run(recipe: Recipe, output: Path) -> list[Recipe]:
    """The recipes of a run in their order: one, or a tokenizer's and that of the model on it."""
    found: list[Recipe] = []
    for stage in recipe.stages:
        part = recipe_of_stage(recipe, stage, output)
        if not found or [one.name for one in part.stages] != [one.name for one in found[-1].stages]:
            found.append(part)
    return found


def _settings(model: ModelSpec, holder: str | None) -> dict[str, Any]:
    """The tokenizer that the first stages train. Raises `ConfigError` where the model does not say what it is."""
    encoder = model.encoders.get(holder) if holder is not None else None
    settings = (encoder.get("tokenizer") if isinstance(encoder, dict) else None) if holder else model.visual_tokenizer
    if not isinstance(settings, dict) or "type" not in settings:
        where = f"model.encoders.{holder}.tokenizer" if holder else "model.visual_tokenizer"
        raise ConfigError(
            f"{where}: stages of kind tokenizer and diffusion train it, so it is given whole: {{type: …}}"
        )
    if "weights" in settings and isinstance(settings["weights"], str):
        raise ConfigError("model.visual_tokenizer.weights: this recipe trains the tokenizer itself; leave weights out")
    return settings
