"""What do the connectors share: projectors, resampling to a grid, attention, positions, and reading routed features?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import AlignmentError, ConfigError, did_you_mean
from mllm.types import EncoderInfo, Grid, Routing, VisionFeatures

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Norm = Literal["layer_norm", "rms_norm"]
Interpolation = Literal["bilinear", "bilinear_corners", "nearest", "area", "pixel_unshuffle", "none"]
"""How a feature map reaches another grid. bilinear: pixel centres (align_corners False; MoVA, Cambrian).
bilinear_corners: corner to corner (align_corners True; Eagle). area: average over the cells that overlap.
pixel_unshuffle: r × r cells stacked on channels, grid an exact multiple. none: grids must already be equal."""


class ProjectorConfig(StrictModel):
    """An MLP: optional norm, ``depth`` linear layers with the activation between them, optional norm."""

    depth: int = Field(default=2, ge=1)
    """1: linear; 2: LLaVA's ``mlp2x_gelu``."""
    activation: Activation = "gelu"
    hidden: int | str | list[int | str] | None = None
    """Widths between the layers, one for all or a list: a number, ``4x`` (times the input width), or ``out`` (the
    output width). Missing ones are ``out``."""
    norm_before: Norm | None = None
    norm_after: Norm | None = None
    bias: bool = True

    @field_validator("hidden")
    @classmethod
    def _widths(cls, value: int | str | list[int | str] | None) -> int | str | list[int | str] | None:
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(item, int) and item < 1:
                raise ValueError(f"a hidden width is positive, got {item}")
            if isinstance(item, str) and item != "out" and not re.fullmatch(r"\d+(\.\d+)?x", item):
                raise ValueError(f"a hidden width is a number, '4x' (times the input width) or 'out', got {item!r}")
        return value

    def widths(self, width_in: int, width_out: int) -> list[int]:
        """Input, hidden and output widths: ``depth + 1`` numbers. Raises `ConfigError`."""
        given = self.hidden if isinstance(self.hidden, list) else [self.hidden] * (self.depth - 1)
        if len(given) > self.depth - 1:
            raise ConfigError(
                f"projector.hidden: {len(given)} hidden widths for depth {self.depth}, which has {self.depth - 1}; "
                f"shorten the list or set depth: {len(given) + 1}"
            )
        given = [*given, *["out"] * (self.depth - 1 - len(given))]
        hidden = [
            item if isinstance(item, int)
            else width_out if item in (None, "out")
            else max(1, round(float(str(item)[:-1]) * width_in))
            for item in given
        ]  # fmt: skip
        return [width_in, *hidden, width_out]


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def activation_layer(name: Activation) -> nn.Module:
    """The activation module of a name; ``gelu`` is the exact one."""
    return nn.GELU(approximate="tanh") if name == "gelu_tanh" else _ACTIVATIONS[name]()


def norm_layer(name: Norm, width: int, *, eps: float = 1e-5) -> nn.Module:
    """A norm over the last dimension."""
    return nn.LayerNorm(width, eps=eps) if name == "layer_norm" else nn.RMSNorm(width, eps=eps)


def build_projector(config: ProjectorConfig, width_in: int, width_out: int) -> nn.Sequential:
    """``(..., width_in)`` → ``(..., width_out)``."""
    widths = config.widths(width_in, width_out)
    layers: list[nn.Module] = [norm_layer(config.norm_before, width_in)] if config.norm_before else []
    for depth, (before, after) in enumerate(pairwise(widths)):
        if depth:
            layers.append(activation_layer(config.activation))
        layers.append(nn.Linear(before, after, bias=config.bias))
    if config.norm_after:
        layers.append(norm_layer(config.norm_after, width_out))
    return nn.Sequential(*layers)


# grids


def check_grid(where: str, encoder: str, grid: Grid, target: Grid, method: Interpolation) -> None:
    """Raise `ConfigError` unless ``method`` can bring ``grid`` to ``target``."""
    if method == "none" and grid != target:
        raise ConfigError(
            f"{where}: encoder {encoder!r} has grid {shown(grid)} but the target grid is {shown(target)}; set "
            f"interpolation: bilinear, or give the encoders image sizes with equal grids"
        )
    if method == "pixel_unshuffle" and (grid[0] % target[0] or grid[1] % target[1]):
        raise ConfigError(
            f"{where}: encoder {encoder!r} has grid {shown(grid)}, not a multiple of the target grid {shown(target)} "
            f"as pixel_unshuffle needs; set grid: [{grid[0]}, {grid[1]}] or a divisor of it, or interpolation: bilinear"
        )


def resampled_width(width: int, grid: Grid, target: Grid, method: Interpolation) -> int:
    """Channels after `resample`."""
    return width * (grid[0] // target[0]) * (grid[1] // target[1]) if method == "pixel_unshuffle" else width


def resample(tokens: Tensor, grid: Grid, target: Grid, method: Interpolation = "bilinear") -> Tensor:
    """``(B, rows * cols, D)`` on ``grid`` → ``(B, N', D')`` on ``target``; computed in fp32, returned in the input's
    dtype.

    D' is D, but for pixel_unshuffle D times the cells merged (channel-major, as `torch.nn.functional.pixel_unshuffle`).
    """
    if grid == target:
        return tokens
    batch, _, width = tokens.shape
    rows, cols = target
    if method == "pixel_unshuffle":
        height, breadth = grid[0] // rows, grid[1] // cols
        cells = tokens.reshape(batch, rows, height, cols, breadth, width)
        return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, rows * cols, width * height * breadth)
    assert method != "none", "grids that differ were let through by layout()"
    image = tokens.transpose(1, 2).reshape(batch, width, *grid).float()
    if method == "area":
        image = F.adaptive_avg_pool2d(image, target)
    elif method == "nearest":
        image = F.interpolate(image, size=target, mode="nearest")
    else:
        image = F.interpolate(image, size=target, mode="bilinear", align_corners=method == "bilinear_corners")
    return image.flatten(2).transpose(1, 2).contiguous().to(tokens.dtype)


def shown(grid: Grid) -> str:
    """A grid as people write it: ``24×24``."""
    return f"{grid[0]}×{grid[1]}"


def position_sincos(
    grid: Grid, width: int, *, extent: Grid | None = None, device: torch.device | None = None
) -> Tensor:
    """Fixed 2-D sine-cosine positions ``(rows * cols, width)`` in fp32: first half of the channels the row, second half
    the column, wavelengths 2π to 20 000π. extent: the grid in whose units cell centres are counted; default the grid
    itself.

    Raises `ConfigError` unless ``width`` is a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {width}")
    extent = extent or grid
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4))

    def axis(cells: int, units: int) -> Tensor:
        centres = (torch.arange(cells, dtype=torch.float32, device=device) + 0.5) * (units / cells) - 0.5
        angles = centres[:, None] * frequencies[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    rows, cols = axis(grid[0], extent[0]), axis(grid[1], extent[1])
    rows = rows[:, None, :].expand(-1, grid[1], -1)
    cols = cols[None, :, :].expand(grid[0], -1, -1)
    return torch.cat([rows, cols], dim=-1).flatten(0, 1)


# attention


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention on ``(B, heads, tokens, head width)``; an empty batch gives an empty result whose
    gradients are zeros, whatever kernel the device has."""
    if query.shape[0] == 0:
        unused = key.sum() + value.sum() + (0 if mask is None else mask.sum())
        return query[..., :1] * value.new_zeros(value.shape[-1]) + 0 * unused
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """``(B, N, C)`` → ``(B, heads, N, C / heads)``."""
    batch, length, width = tokens.shape
    return tokens.view(batch, length, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """``(B, heads, N, d)`` → ``(B, N, heads * d)``."""
    batch, heads, length, width = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, length, heads * width)


# encoders and routing


def single(where: str, encoders: Mapping[str, EncoderInfo]) -> str:
    """The one encoder's name. Raises `ConfigError` when there are several."""
    if len(encoders) != 1:
        grids = ", ".join(f"{name} ({shown(info.grid)})" for name, info in encoders.items()) or "none"
        raise ConfigError(
            f"{where}: takes exactly one encoder, the model has {len(encoders)}: {grids}; keep one, or use a "
            f"connector that joins several (channel_concat, sequence_concat, interleave, spatial_aggregator, mova, "
            f"merv)"
        )
    return next(iter(encoders))


def at_least(where: str, encoders: Mapping[str, EncoderInfo], number: int) -> None:
    """Raise `ConfigError` when there are fewer encoders than ``number``."""
    if len(encoders) < number:
        raise ConfigError(
            f"{where}: needs at least {number} encoder{'s' if number > 1 else ''}, the model has {len(encoders)}; "
            f"add one under model.encoders"
        )


def known_encoder(where: str, name: str, encoders: Iterable[str]) -> str:
    """``name`` itself. Raises `ConfigError` unless the model has an encoder of that name."""
    encoders = list(encoders)
    if name not in encoders:
        raise ConfigError(
            f"{where}: the model has no encoder {name!r}{did_you_mean(name, encoders)}. Encoders: {', '.join(encoders)}"
        )
    return name


def asking_and_answering(
    connector: str, encoders: Mapping[str, EncoderInfo], query: str | None, source: str | None
) -> tuple[str, str]:
    """Names of the encoder whose tokens ask and of the one whose tokens answer. query, source: those of the config; default: the first
    and the other. Raises `ConfigError` for other than two encoders, an unknown one and one in both roles."""
    if len(encoders) != 2:
        raise ConfigError(
            f"connector {connector}: takes exactly two encoders, the model has {len(encoders)}: {', '.join(encoders) or 'none'}"
        )
    for key, name in (("query", query), ("source", source)):
        if name is not None:
            known_encoder(f"connector {connector}: {key}", name, encoders)
    query = query or next(name for name in encoders if name != source)
    source = source or next(name for name in encoders if name != query)
    if query == source:
        raise ConfigError(f"connector {connector}: query and source are both {query!r}; they are two encoders")
    return query, source


def read_features(
    encoders: Mapping[str, EncoderInfo], features: Mapping[str, VisionFeatures], routing: Routing | None = None
) -> dict[str, Tensor]:
    """Tokens ``(B, N, D)`` of every encoder in order, checked against its `EncoderInfo`; zeros for an absent expert.

    Raises `AlignmentError` when features of an encoder that is needed are absent or have another shape.
    """
    found = {name: features[name].tokens for name in encoders if name in features}
    if not found:
        raise AlignmentError(f"no features of any encoder ({', '.join(encoders)}) in the batch; got {sorted(features)}")
    first = next(iter(found.values()))
    batch = first.shape[0]
    for name, tokens in found.items():
        info = encoders[name]
        expected = (batch, info.num_tokens, info.width)
        if tuple(tokens.shape) != expected or tuple(features[name].grid) != tuple(info.grid):
            raise AlignmentError(
                f"features of encoder {name!r} have shape {tuple(tokens.shape)} on grid {shown(features[name].grid)}, "
                f"expected {expected} on grid {shown(info.grid)} (batch size from {next(iter(found))!r})"
            )
    if routing is not None and routing.weights.shape[0] != batch:
        raise AlignmentError(f"routing of {routing.weights.shape[0]} images for features of {batch} images")
    result = {}
    for name, info in encoders.items():
        if name not in found:
            _check_absent(name, routing)
            found[name] = first.new_zeros(batch, info.num_tokens, info.width)
        result[name] = found[name]
    return result


def _check_absent(name: str, routing: Routing | None) -> None:
    if routing is None or name not in routing.experts:
        raise AlignmentError(f"features of encoder {name!r} are absent from the batch and no routing switched it off")
    if torch.compiler.is_compiling():
        return
    used = int((routing.weights[:, routing.experts.index(name)] > 0).sum())
    if used:
        raise AlignmentError(
            f"features of expert {name!r} are absent from the batch, but {used} images are routed to it"
        )


def expert_weight(routing: Routing | None, name: str, *, select: bool = False) -> Tensor | None:
    """Weight ``(B,)`` of an encoder, or None when it is not routed (always on).

    select: 1 where the expert runs and 0 elsewhere, with the weight's own gradient (straight through), so a gate still
    learns.
    """
    if routing is None or name not in routing.experts:
        return None
    weight = routing.weights[:, routing.experts.index(name)]
    return (weight > 0).to(weight.dtype) + (weight - weight.detach()) if select else weight


def weigh(tokens: Tensor, weight: Tensor | None) -> Tensor:
    """``(B, N, D)`` times a weight ``(B,)`` per image; unchanged when None."""
    return tokens if weight is None else tokens * weight[:, None, None].to(tokens.dtype)


def log_weight(weight: Tensor) -> Tensor:
    """Log of weights, fp32, ``-inf`` with no gradient where zero: added to attention logits, a weight scales the share
    its expert gets, and a gate learns through it even where a norm follows."""
    weight = weight.float()
    used = weight > 0
    return torch.where(used, torch.where(used, weight, 1.0).log(), float("-inf"))


def unblind(bias: Tensor) -> Tensor:
    """Rows (last dimension) that are ``-inf`` throughout become 0: attention over nothing reads everything, never
    NaN."""
    return bias.masked_fill((bias == float("-inf")).all(dim=-1, keepdim=True), 0.0)
