"""What does SN-Netv2 see: two ViTs joined by linear layers into one encoder of many sizes, chosen when it runs (arXiv 2307.00154)?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder
from mllm.encoders.backbones.layers import IMAGENET, Mlp, SelfAttention, drop, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.costs import gflops
from mllm.encoders.library import LayerOutput
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError
from mllm.types import ImageSpec

Two = tuple[int, int]
_EPS = 1e-6
_NEVER_SAMPLED = (12, 11)
"""The authors never sample the route that leaves a small model of 12 blocks after its last one."""


class SnNetConfig(BackboneConfig):
    """SN-Netv2, small model first; defaults are DeiT-III-S and DeiT-III-B."""

    widths: Two = (384, 768)
    depths: Two = (12, 12)
    num_heads: Two = (6, 12)
    patch_size: int = Field(default=16, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    trained_size: int = Field(default=224, gt=0)
    """Image size of the position tables, which are resized."""
    rank: int = Field(default=64, gt=0)
    """Of the update of each joining layer, whose base weight does not learn."""
    ends: Literal["small", "large"] = "large"
    """The model whose blocks come last: its width is the encoder's, so every route that ends there fits one connector."""
    route: int | None = Field(default=None, ge=0)
    """Id in the table of routes (`routes`). Default: the model of ``ends`` alone."""
    budget: float | None = Field(default=None, gt=0)
    """GFLOPs an image may cost, in place of ``route``: the dearest route within it is taken."""
    sample_routes: bool = False
    """While the encoder learns each batch takes a route at random: first one of the cost groups, then a route of it."""
    cost_groups: int = Field(default=10, ge=1)
    """Groups of like cost that are sampled alike often."""


@dataclass(frozen=True)
class Route:
    """A way through both models. segments: ``(model, first block, last block)``; joins: the layer between two segments."""

    id: int
    segments: tuple[tuple[int, int, int], ...]
    joins: tuple[int, ...]


@cache
def routes(depths: Two) -> tuple[Route, ...]:
    """The authors' table: small alone, large alone, small to large, large to small, large to small to large, small to large to
    small. Ids are places in it, and they shift if a rule changes."""
    small, large = depths
    ratio = large // small
    same = small == large
    nearest = [
        min(int(i * small / large), small - 1) for i in range(large)
    ]  # as nearest resizing of block numbers does
    to_large = [(i, (i + 1) * ratio) for i in range(small)]
    leaves = range(large - 1) if same else range(1, large - 1, 2)
    to_small = [(i, nearest[i] + 1) for i in leaves]
    found: list[tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]] = [
        (((0, 0, small),), ()),
        (((1, 0, large),), ()),
    ]
    found += [(((0, 0, i), (1, j, large)), (i,)) for i, j in to_large]
    found += [(((1, 0, i), (0, j, small)), (i // ratio,)) for i, j in to_small]
    for i, j in to_small:
        for leave, enter in to_large:
            if leave >= j and enter < large:
                found.append((((1, 0, i), (0, j, leave), (1, enter, large)), (i // ratio, leave)))
    for i, j in to_large:
        for leave, enter in to_small:
            if leave >= j:
                found.append((((0, 0, i), (1, j, leave), (0, enter, small)), (i, leave // ratio)))
    return tuple(Route(number, segments, joins) for number, (segments, joins) in enumerate(found))


def sampled(depths: Two) -> list[Route]:
    """The routes that the authors train."""
    small, block = _NEVER_SAMPLED
    left_out = [
        r for r in routes(depths) if depths[0] == small and len(r.segments) == 2 and r.segments[0] == (0, 0, block)
    ]
    return [r for r in routes(depths) if r not in left_out]


class Block(nn.Module):
    """Pre-norm block with layer scale on ``(B, N, D)``."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((width,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((width,), 1e-4))
        self.drop_path = drop(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Anchor(nn.Module):
    """One of the two models. Its class token has no position."""

    def __init__(self, config: SnNetConfig, which: int):
        super().__init__()
        width, self.side = config.widths[which], config.trained_size // config.patch_size
        self.cls_token = token_table(1, 1, width)
        self.pos_embed = token_table(1, self.side**2, width)
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads[which], config.mlp_ratio, config.drop_path)
            for _ in range(config.depths[which])
        )
        self.norm = nn.LayerNorm(width, eps=_EPS) if config.final_norm else None

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        size = self.patch_embed.proj.kernel_size[0]
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        x = (
            x + resize_positions(self.pos_embed, (self.side, self.side), grid)
            if grid != (self.side,) * 2
            else x + self.pos_embed
        )
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


class JoiningLinear(nn.Linear):
    """A linear layer whose base weight is fixed and whose update ``B A / rank`` learns."""

    def __init__(self, before: int, after: int, rank: int):
        super().__init__(before, after)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, before))
        self.lora_B = nn.Parameter(torch.zeros(after, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        update = F.linear(F.linear(input, self.lora_A), self.lora_B) / len(self.lora_A)
        return super().forward(input) + update


class SnNet(nn.Module):
    """Pixels to the last model's tokens by the route of a call, under the authors' names."""

    recompute = False

    def __init__(self, config: SnNetConfig):
        super().__init__()
        self.anchors = nn.ModuleList(Anchor(config, which) for which in range(2))
        small, large = config.widths
        table = routes(config.depths)
        counts = [
            1 + max((r.joins[k] for r in table for k in range(len(r.joins)) if r.segments[k][0] == b), default=-1)
            for b in (0, 1)
        ]
        self.stitch_layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"transform": JoiningLinear(*pair, config.rank)}) for _ in range(counts[way]))
            for way, pair in enumerate(((small, large), (large, small)))
        )
        self.apply(init_linear)

    def forward(self, pixels: Tensor, route: Route) -> Tensor:
        """``(B, 1 + N, D)``, the class token first."""
        x: Any = self.anchors[route.segments[0][0]].embed(pixels)  # type: ignore[operator]
        for k, (which, first, last) in enumerate(route.segments):
            anchor: Any = self.anchors[which]
            for block in anchor.blocks[first : last + 1]:
                x = run(block, x, recompute=self.recompute)
            if k < len(route.joins):
                x = self.stitch_layers[which][route.joins[k]]["transform"](x)  # type: ignore[index]
        norm = self.anchors[route.segments[-1][0]].norm
        return x if norm is None else norm(x)  # type: ignore[operator]


@cache
def _route_costs(settings: str) -> dict[int, float]:
    """GFLOPs of an image on every route that a config as JSON can take. Blocks of a model cost the same, so one of each kind is
    counted."""
    config = SnNetConfig.model_validate_json(settings)
    with torch.device("meta"):
        model = SnNet(config).eval()
    image = config.info.image  # type: ignore[union-attr]
    tokens = 1 + (image.height // config.patch_size) * (image.width // config.patch_size)
    anchors: Any = model.anchors
    size = (1, 3, image.height, image.width)
    starts = [gflops(anchor.embed, size) for anchor in anchors]
    blocks = [gflops(anchor.blocks[0], (1, tokens, width)) for anchor, width in zip(anchors, config.widths)]
    layers: Any = model.stitch_layers
    joins = [gflops(layers[k][0]["transform"], (1, tokens, width)) for k, width in enumerate(config.widths)]
    found = {}
    for route in routes(config.depths):
        cost = starts[route.segments[0][0]]
        for k, (which, first, last) in enumerate(route.segments):
            cost += blocks[which] * len(range(config.depths[which])[first : last + 1])
            cost += joins[which] if k < len(route.joins) else 0.0
        found[route.id] = cost
    return found


class SnNetEncoder(BackboneEncoder):
    """One encoder, many sizes: `choose` sets the route by id or by what an image may cost, at any time. Both models stay in memory.
    Prefix: the class token."""

    Config: ClassVar[type[EncoderConfig]] = SnNetConfig
    config: SnNetConfig
    model: SnNet

    def __init__(self, config: SnNetConfig):
        super().__init__(config)
        self.route = self._chosen(self.config)
        # Batches of all processes take the same route, also after a resumed run: the draw follows from their number.
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long), persistent=config.sample_routes)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "snnet",
            "widths": [16, 24],
            "depths": [2, 4],
            "num_heads": [2, 3],
            "patch_size": 4,
            "trained_size": 16,
            "rank": 2,
            "mlp_ratio": 2.0,
            "image_size": [16, 20],
            "route": 2,
            "keep_prefix": True,
        }

    @classmethod
    def default_image(cls, config: SnNetConfig) -> ImageSpec:
        return ImageSpec(height=config.trained_size, width=config.trained_size, **IMAGENET)

    @classmethod
    def build(cls, config: SnNetConfig) -> SnNet:
        small, large = config.depths
        if large % small:
            raise ConfigError(f"depths: {large} blocks are no multiple of {small}; routes pair them")
        for which, name in enumerate(("small", "large")):
            if config.widths[which] % config.num_heads[which]:
                raise ConfigError(
                    f"num_heads: {config.num_heads[which]} do not divide width {config.widths[which]} ({name})"
                )
        if config.trained_size % config.patch_size:
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        if config.layers != [-1]:
            raise ConfigError("layers: the blocks that run are the route's; layers is [-1]")
        if config.route is not None and config.budget is not None:
            raise ConfigError("budget: route is given too; give one of them")
        return SnNet(config)

    @classmethod
    def possible(cls, config: SnNetConfig) -> list[Route]:
        """The routes that end where the config says, of those that are trained; `choose` takes any by its id."""
        last = 0 if config.ends == "small" else 1
        return [r for r in sampled(config.depths) if r.segments[-1][0] == last]

    @classmethod
    def route_costs(cls, config: SnNetConfig) -> dict[int, float]:
        """GFLOPs of an image by route id, of a resolved config: the routes that `choose` takes."""
        plain = config.model_copy(update={"route": None, "budget": None, "sample_routes": False, "weights": None})
        costs = _route_costs(plain.model_dump_json())
        return {r.id: costs[r.id] for r in cls.possible(config)}

    def choose(self, *, route: int | None = None, budget: float | None = None) -> Route:
        """Take another route from now on: an id, or the dearest one within ``budget`` GFLOPs an image. Raises `ConfigError` naming
        what there is."""
        self.route = self._chosen(self.config.model_copy(update={"route": route, "budget": budget}))
        return self.route

    @classmethod
    def _chosen(cls, config: SnNetConfig) -> Route:
        table = {r.id: r for r in cls.possible(config)}
        if config.budget is not None and (config.info is None or config.info.grid == (1, 1)):
            return table[0 if config.ends == "small" else 1]  # sizes are being measured
        if config.budget is not None:
            costs = cls.route_costs(config)
            within = [number for number, cost in costs.items() if cost <= config.budget]
            if not within:
                least = min(costs.values())
                raise ConfigError(
                    f"budget: {config.budget:g} GFLOPs an image are too few; the cheapest route needs {least:.3g}"
                )
            return table[max(within, key=costs.__getitem__)]
        number = config.route if config.route is not None else 0 if config.ends == "small" else 1
        last = 0 if config.ends == "small" else 1
        table = {r.id: r for r in routes(config.depths) if r.segments[-1][0] == last}
        if number not in table:
            shown = ", ".join(str(key) for key in list(table)[:12])
            raise ConfigError(
                f"route: {number} is none of the {len(table)} routes that end in the {config.ends} model ({shown} …); its width is the "
                "encoder's, so set ends for the others"
            )
        return table[number]

    @classmethod
    def published_names(cls, config: SnNetConfig) -> set[str]:
        names = super().published_names(config)
        return names | {f"anchors.{k}.head.{kind}" for k in range(2) for kind in ("weight", "bias")}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        route = self._drawn() if self.training and self.config.sample_routes and not pixels.is_meta else self.route
        x = self.model(pixels, route)
        size = self.config.patch_size
        return [LayerOutput(x[:, 1:], (pixels.shape[2] // size, pixels.shape[3] // size), x[:, :1])]

    def _drawn(self) -> Route:
        costs = self.route_costs(self.config)
        ordered = sorted(costs, key=costs.__getitem__)
        generator = torch.Generator().manual_seed(int(self.batches_seen))
        self.batches_seen += 1
        groups = min(self.config.cost_groups, len(ordered))
        group = int(torch.randint(groups, (), generator=generator))
        members = ordered[group * len(ordered) // groups : (group + 1) * len(ordered) // groups]
        chosen = members[int(torch.randint(len(members), (), generator=generator))]
        return next(r for r in self.possible(self.config) if r.id == chosen)

    def last_cost(self) -> dict[str, float]:
        """Of the chosen route: ``gflops`` an image, and its id."""
        return {"gflops": self.route_costs(self.config)[self.route.id], "route": float(self.route.id)}

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """A layer is a block of the small model with the large one's at the same depth; joins and norms come last."""
        starts, (small, large) = [], self.config.depths
        for which in range(2):
            starts += [f"model.anchors.{which}.{part}" for part in ("cls_token", "pos_embed", "patch_embed.")]
        layers = []
        for i in range(small):
            own = [f"model.anchors.0.blocks.{i}."]
            own += [f"model.anchors.1.blocks.{j}." for j in range(i * large // small, (i + 1) * large // small)]
            layers.append((f"layers.{i}", own))
        names = [name for name, _ in self.named_parameters()]
        rest = ["model.stitch_layers.", "model.anchors.0.norm.", "model.anchors.1.norm."]
        rest = [p for p in rest if any(name.startswith(p) for name in names)]
        return [("embeddings", starts), *layers, ("joins", rest)]
