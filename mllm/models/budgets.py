"""How does a trained model give fewer visual tokens for a picture, with the weights that it has?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from mllm.connectors.build import connector_config
from mllm.encoders.catalogue import encoder_config
from mllm.errors import ConfigError, DataError
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.pipeline import build_visual_parts
from mllm.processing.layout import LayoutRules, layout_rules
from mllm.processing.views.base import BudgetConfig, views_config
from mllm.types import EncoderInfo, Grid

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.processing.processor import MllmProcessor


def most_tokens(config: MllmConfig) -> int:
    """Visual tokens of the picture that takes most."""
    rules = config.layout_rules()
    return rules.layout(rules.largest()).num_tokens


def what_gives_way(config: MllmConfig) -> str:
    """What `at_tokens` changes of this model, in words. Raises `ConfigError` for a model whose every part fixes the number."""
    views, connector = views_config(config.views), dict(config.connector or {})
    if isinstance(views, BudgetConfig):
        return f"model.views.max_visual_tokens (views {views.type}: fewer tiles, or a smaller picture)"
    if connector.get("type") == "resampler":
        return (
            "model.connector.grid (learned queries averaged to a coarser grid)"
            if connector.get("grid")
            else "model.connector.num_queries (the first of the learned queries)"
        )
    if _looking_up(config) is not None:
        return f"encoders.{_looking_up(config)}.compressed_grid (LookupViT)"
    if connector.get("type") == "average_pool":
        return "model.connector.grid (average_pool)"
    raise ConfigError(
        "this model gives one number of visual tokens, on which its weights depend; a number chosen afterwards have views tiles and "
        "native, connectors resampler and average_pool, and encoder lookupvit"
    )


@contextmanager
def at_tokens(model: MllmForConditionalGeneration, processor: MllmProcessor, tokens: int) -> Iterator[int]:
    """The model and its processor with at most ``tokens`` visual tokens a picture (a view, where it is seen in several by a connector
    that decides the number); yields the most that a picture then takes. Afterwards all is as before.

    Raises `ConfigError` for a number that no choice of this model's gives.
    """
    body: Any = model.model
    config: MllmConfig = model.config
    before = {key: getattr(config, key) for key in ("views", "encoders", "connector")}
    images: Any = processor.image_processor
    rules = body.rules
    seen = {key: getattr(images, key) for key in ("views", "layout")}
    parts = (body.vision_tower, body.multi_modal_projector)
    changes = _changes(config, tokens)
    try:
        for key, value in changes.items():
            setattr(config, key, value)
        found: LayoutRules = layout_rules(config, config.encoder_infos())
        most = found.layout(found.largest()).num_tokens
        if "connector" in changes:
            body.vision_tower, body.multi_modal_projector = _rebuilt(config, *parts)
        body.rules = found
        images.views, images.layout = config.views, found.view.model_dump(mode="json")
        yield most
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        for key, value in seen.items():
            setattr(images, key, value)
        body.rules = rules
        body.vision_tower, body.multi_modal_projector = parts


def _changes(config: MllmConfig, tokens: int) -> dict[str, Any]:
    """Config keys with their values at so many tokens."""
    what_gives_way(config)
    views, connector = views_config(config.views), dict(config.connector or {})
    if isinstance(views, BudgetConfig):
        changed = views.model_copy(update={"max_visual_tokens": tokens}).model_dump(mode="json")
        rules = config.layout_rules()
        try:
            LayoutRules(rules.view, rules.images, views_config(changed)).layout(rules.largest())
        except DataError as error:
            raise ConfigError(f"{tokens} visual tokens a picture: {error}") from None
        return {"views": changed}
    if connector.get("type") == "resampler":
        grid, queries = connector.get("grid"), connector.get("num_queries") or 64
        if tokens > (grid[0] * grid[1] if grid else queries):
            raise ConfigError(f"{tokens} visual tokens a picture: the resampler has {grid or queries} learned queries")
        changed = {"grid": fitting_grid(tuple(grid), tokens)} if grid else {"num_queries": tokens}
        return {"connector": {**connector, **changed}, "encoders": config.encoders}
    infos = {name: EncoderInfo.model_validate(encoder["info"]) for name, encoder in config.encoders.items()}
    if (name := _looking_up(config)) is not None:
        encoder = dict(config.encoders[name])
        grid = fitting_grid(tuple(encoder["compressed_grid"]), tokens)
        encoder |= {"compressed_grid": grid, "info": None}
        resolved = encoder_config(encoder, where=f"encoders.{name}").model_dump(mode="json")
        return {"encoders": {**config.encoders, name: resolved}, "connector": connector}
    ((name, info),) = infos.items()
    pooled = connector_config(connector)
    grid = fitting_grid(
        tuple(connector["grid"]), tokens, within=None if getattr(pooled, "overlap", False) else info.grid
    )
    return {"connector": {**connector, "grid": grid}, "encoders": config.encoders}


def _looking_up(config: MllmConfig) -> str | None:
    """The one encoder, where it is a LookupViT that hands out its compressed tokens to a connector which keeps their number."""
    ((name, encoder), *others) = list(config.encoders.items()) or [("", {})]
    fixed = (config.connector or {}).get("type") not in ("linear", "mlp")
    gives = encoder.get("type") == "lookupvit" and encoder.get("output", "compressed") == "compressed"
    return name if gives and not others and not fixed else None


def fitting_grid(grid: Grid, tokens: int, within: Grid | None = None) -> Grid:
    """The largest grid of at most so many cells whose shape is nearest to ``grid``'s, no larger than it a side. within: only such whose
    sides divide its. Raises `ConfigError` where there is none."""
    shape = grid[0] / grid[1]
    found = [
        (rows, columns)
        for rows in range(1, grid[0] + 1)
        for columns in range(1, grid[1] + 1)
        if rows * columns <= tokens and (within is None or not (within[0] % rows or within[1] % columns))
    ]
    if not found:
        raise ConfigError(f"{tokens} visual tokens a picture: expected at least 1")

    def fit(cells: Grid) -> tuple[float, int]:
        distortion = max(cells[0] / cells[1] / shape, shape * cells[1] / cells[0])
        return cells[0] * cells[1] / distortion, cells[0] * cells[1]

    return max(found, key=fit)


def _rebuilt(config: MllmConfig, bank: Any, connector: Any) -> tuple[Any, Any]:
    """Encoders and connector of a changed config with the weights of these."""
    parameter = next(iter([*connector.parameters(), *bank.parameters()]))
    made_bank, made = build_visual_parts(config)
    assert made_bank is not None and made is not None
    made_bank.load_state_dict(bank.state_dict())
    weights: Mapping[str, Tensor] = connector.state_dict()
    if "queries" in weights and weights["queries"].shape != made.state_dict()["queries"].shape:
        weights = {**weights, "queries": _fewer(weights["queries"], connector.config, made.config)}
    made.load_state_dict(weights)
    return made_bank.to(parameter.device, parameter.dtype).eval(), made.to(parameter.device, parameter.dtype).eval()


def _fewer(queries: Tensor, before: Any, after: Any) -> Tensor:
    """Learned queries ``(Q, W)`` as fewer: the first ones, or those of a grid averaged to a coarser one."""
    if after.grid is None:
        return queries[: after.num_queries]
    grid = queries.T.unflatten(1, before.grid)[None].float()
    return F.adaptive_avg_pool2d(grid, after.grid).to(queries.dtype)[0].flatten(1).T.contiguous()
