"""How do pixels become visual tokens? Encoders → router → connector, the same code in HF, training and vLLM."""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm.connectors.build import build_connector, connector_config
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.series import features_for, reading_order
from mllm.errors import AlignmentError, ConfigError
from mllm.models.routing import limit_routing
from mllm.recipe import reader_of
from mllm.types import Routing, VisionFeatures, VisualLayout

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig


class EncoderBank(nn.Module):
    """The named encoders of a model (and its router): pixels → features by encoder name.

    A routed encoder runs only on the images whose routing weight for it is not zero; on the others its features are zeros.
    """

    def __init__(self, encoders: Mapping[str, Any], router: Mapping[str, Any] | None = None, text_width: int = 0):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: build_encoder(encoder_config(config, where=f"encoders.{name}")) for name, config in encoders.items()}
        )
        self.infos = {name: e.describe(e.config) for name, e in self.encoders.items()}  # pyright: ignore[reportCallIssue]
        self.experts: tuple[str, ...] = tuple((router or {}).get("experts", ()))
        read = {name: getattr(e.config, "reads", None) for name, e in self.encoders.items()}
        self.reads: dict[str, str] = {name: source.encoder for name, source in read.items() if source is not None}
        """Encoder → the one whose features it reads in place of pixels."""
        self._order = reading_order({name: self.reads.get(name) for name in self.encoders})
        for reader, source in self.reads.items():
            if {reader, source} & set(self.experts):
                raise ConfigError(
                    f"router.experts: encoder {reader!r} reads {source!r}, and both must then run on every picture; take them off the "
                    "router's list"
                )
        self.with_attention: frozenset[str] = frozenset()
        """Encoders whose last attention map the connector reads."""
        self.num_encoded: Counter[str] = Counter()
        """Images that each encoder has run on; ``clear()`` it to start anew."""
        self.router: nn.Module | None = None
        if router is not None:
            from mllm.routers.build import build_router

            unknown = [name for name in self.experts if name not in self.encoders]
            if unknown:
                raise ConfigError(
                    f"router.experts: {unknown[0]!r} is no encoder of this model; it has {list(self.encoders)}"
                )
            summary = sum(self.infos[name].width for name in self.always_on)
            self.router = build_router(dict(router), summary, text_width)

    @property
    def always_on(self) -> list[str]:
        """Names of the encoders that run on every image."""
        return [name for name in self.encoders if name not in self.experts]

    def route(
        self,
        features: Mapping[str, VisionFeatures],
        text: Tensor | None,
        allowed: Tensor | None = None,
        *,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Routing:
        """Ask the router, given the always-on encoders' features of B images (of all their views, where ``layouts`` tell of
        several) and the questions' mean embedding."""
        assert self.router is not None
        parts = [_per_visual(features[name].tokens.mean(dim=1), layouts, name) for name in self.always_on]
        if parts:
            summary = torch.cat(parts, dim=-1)
        else:
            assert text is not None
            summary = text.new_zeros(text.shape[0], 0)
        return self.router(summary, text, allowed)

    def forward(
        self,
        pixels: Mapping[str, Tensor],
        *,
        expert_weights: Tensor | None = None,
        text: Tensor | None = None,
        base: Mapping[str, VisionFeatures] | None = None,
        expert_budget: int | None = None,
        expert_threshold: float | None = None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> tuple[dict[str, VisionFeatures], Routing | None]:
        """pixels: encoder name → ``(V, 3, H, W)``, the views of B images as ``layouts`` tell (None: one each);
        expert_weights ``(B, E)`` fixes the routing (rows of NaN: not fixed); text ``(B, L)``; base: what `encode_base` gave
        for these pixels, to save running it again; expert_budget, expert_threshold: see
        `mllm.models.routing.limit_routing`. Returns features in the model's order and the routing, None for a model without
        router."""
        self._check(pixels, list(self.encoders), layouts)
        features = dict(base) if base is not None else self.encode_base(pixels, layouts)
        routing = self._routing(features, expert_weights, text, layouts) if self.experts else None
        if routing is not None:
            fixed = None if expert_weights is None else ~expert_weights.isnan().any(dim=-1)
            routing = limit_routing(routing, budget=expert_budget, threshold=expert_threshold, fixed=fixed)
            features |= self._encode_experts(pixels, routing, layouts)
        return {name: features[name] for name in self.encoders}, routing

    def encode_base(
        self, pixels: Mapping[str, Tensor], layouts: Sequence[VisualLayout] | None = None
    ) -> dict[str, VisionFeatures]:
        """Features of the always-on encoders; the experts' pixels are not needed."""
        self._check(pixels, self.always_on, layouts)
        features: dict[str, VisionFeatures] = {}
        for name in self._order:
            if name not in self.experts:
                source = self.reads.get(name)
                given = None if source is None else features_for(name, source, features[source], layouts)
                features[name] = self._encode(name, pixels[name], layouts, given=given)
        return {name: features[name] for name in self.always_on}

    def _check(self, pixels: Mapping[str, Tensor], needed: list[str], layouts: Sequence[VisualLayout] | None) -> None:
        missing = [name for name in needed if name not in pixels]
        if missing:
            raise AlignmentError(f"no pixels for encoder {missing[0]!r}; got {sorted(pixels)}, need {needed}")
        counts = {name: pixels[name].shape[0] for name in needed}
        if layouts is None:
            if len(set(counts.values())) > 1:
                raise AlignmentError(f"encoders were given different numbers of images: {counts}")
            return
        views = {name: sum(layout.rows_of(name) for layout in layouts) for name in needed}
        if counts != views:
            shown = next(iter(views.values())) if len(set(views.values())) == 1 else views
            raise AlignmentError(f"{len(layouts)} images have {shown} views; pixels were given for {counts}")

    def encode_expert(self, name: str, pixels: Tensor) -> VisionFeatures:
        """Features of one expert on all of B images, whatever the routing."""
        return self._encode(name, pixels)

    def _encode(
        self,
        name: str,
        pixels: Tensor,
        layouts: Sequence[VisualLayout] | None = None,
        *,
        chosen: Tensor | None = None,
        idle: bool = False,
        given: VisionFeatures | None = None,
    ) -> VisionFeatures:
        """Features of one encoder. given: another's, which it reads; layouts: of all images of the batch, for encoders in which views
        of an image see each other;
        chosen: which rows of the batch's pixels these are, where they are not all."""
        encoder = self.encoders[name]
        if not idle:
            self.num_encoded[name] += len(pixels)
        parameter = next(encoder.parameters(), None)
        if parameter is not None:
            codes = not pixels.is_floating_point() and hasattr(encoder, "tokenizer")  # stored codes in place of pixels
            exact = (
                codes or self.infos[name].image.cameras is not None
            )  # which the encoder rounds itself, all but the cameras
            pixels = pixels.to(home_of(parameter, pixels), None if exact else parameter.dtype)
        if layouts is not None and any(layout.patches is not None for layout in layouts):
            with fetched(encoder):
                return encoder(pixels, grids=[layout.patches for layout in layouts])
        options: dict[str, Any] = {} if given is None else {"given": given}
        if layouts is not None and encoder.joins_views and not idle:
            scenes, places = _scenes(layouts, name)
            scenes, places = (part if chosen is None else part[chosen.to("cpu")] for part in (scenes, places))
            with fetched(encoder):
                return encoder(pixels, scene_ids=scenes.to(pixels.device), places=places.to(pixels.device), **options)
        if name in self.with_attention:
            options["return_attention"] = True
        with fetched(encoder):
            return encoder(pixels, **options)

    def _encode_experts(
        self, pixels: Mapping[str, Tensor], routing: Routing, layouts: Sequence[VisualLayout] | None
    ) -> dict[str, VisionFeatures]:
        """Every expert on (all views of) the images routed to it, grouped, its features scattered back among zeros."""
        used = routing.weights.detach().ne(0).cpu()  # one transfer for all experts
        elsewhere = self._used_by_any_rank(used)
        features = {}
        for index, name in enumerate(self.experts):
            of_images = used[:, index]
            if layouts is not None:
                of_images = of_images.repeat_interleave(torch.tensor([layout.rows_of(name) for layout in layouts]))
            rows = of_images.nonzero()[:, 0]
            features[name] = self._encode_routed(name, pixels[name], rows, elsewhere[index], layouts)
        return features

    def _encode_routed(
        self,
        name: str,
        pixels: Tensor,
        rows: Tensor,
        used_elsewhere: bool,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> VisionFeatures:
        encoder, batch = self.encoders[name], len(pixels)
        if len(rows) and len(rows) == batch:
            return self._encode(name, pixels, layouts)
        if len(rows):
            found = self._encode(name, pixels[rows.to(pixels.device)], layouts, chosen=rows)
            rows = rows.to(found.tokens.device)
            return VisionFeatures(
                _scatter(found.tokens, rows, batch),
                found.grid,
                None if found.prefix is None else _scatter(found.prefix, rows, batch),
                None if found.attention is None else _scatter(found.attention, rows, batch),
            )
        if name in self.with_attention and batch:  # the connector needs a map of the right shape
            found = self._encode(name, pixels[:1], idle=True)
            assert found.attention is not None
            none, attention = rows.to(found.tokens.device), found.attention[:0]
            return VisionFeatures(
                _scatter(found.tokens[:0], none, batch), found.grid, None, _scatter(attention, none, batch)
            )
        info, parameter = self.infos[name], next(encoder.parameters(), pixels)
        tokens = torch.zeros(
            batch, info.grid[0] * info.grid[1], info.width, dtype=parameter.dtype, device=home_of(parameter, pixels)
        )
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        if batch and (used_elsewhere or (learning and _several_ranks())):
            # Ranks reduce the gradients of the same weights in the same order (in another one ZeRO-1/2 adds up unlike weights,
            # silently), and under ZeRO-3 gather weights together: so an expert runs on one image, for nothing, where it is not used.
            tokens = tokens + 0.0 * self._encode(name, pixels[:1], idle=True).tokens.sum()
        elif learning:
            tokens = tokens + 0.0 * sum(p.sum() for p in encoder.parameters() if p.requires_grad).to(tokens)  # pyright: ignore[reportAttributeAccessIssue]
        return VisionFeatures(tokens, info.grid)

    def _used_by_any_rank(self, used: Tensor) -> list[bool]:
        """For each expert, whether this rank must run it because another one does: only where weights are partitioned."""
        partitioned = [_is_partitioned(self.encoders[name]) for name in self.experts]
        if not any(partitioned) or not _several_ranks():
            return [False] * len(partitioned)
        device = next(p.device for name in self.experts for p in self.encoders[name].parameters())
        anywhere = used.any(dim=0).to(device, torch.int32)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return [bool(a) and p for a, p in zip(anywhere.tolist(), partitioned)]

    def _routing(
        self,
        features: Mapping[str, VisionFeatures],
        fixed: Tensor | None,
        text: Tensor | None,
        layouts: Sequence[VisualLayout] | None,
    ) -> Routing:
        if fixed is not None and fixed.shape[-1] != len(self.experts):
            raise AlignmentError(
                f"expert_weights has {fixed.shape[-1]} columns, the model {len(self.experts)} experts {self.experts}"
            )
        assert self.router is not None
        # A router that learns (or whose weights are gathered by all ranks together) is asked even when nothing is left to choose.
        together = torch.is_grad_enabled() and any(
            p.requires_grad or hasattr(p, "ds_id") for p in self.router.parameters()
        )
        if fixed is not None and not together and not fixed.isnan().any():
            return Routing(self.experts, fixed)
        routing = self.route(features, text, layouts=layouts)
        if fixed is not None:
            fixed = fixed.to(routing.weights)
            free = fixed.isnan().any(dim=-1, keepdim=True)
            routing.weights = torch.where(free, routing.weights, fixed)
        return routing


def _scatter(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Rows ``(R, …)`` put into zeros ``(batch, …)`` at ``rows``."""
    return values.new_zeros(batch, *values.shape[1:]).index_copy(0, rows, values)


def _per_visual(values: Tensor, layouts: Sequence[VisualLayout] | None, encoder: str) -> Tensor:
    """Values ``(V, D)`` of an encoder's views averaged to ``(B, D)`` of their visuals."""
    if layouts is None or len(layouts) == len(values):
        return values
    return torch.stack([part.mean(dim=0) for part in values.split([layout.rows_of(encoder) for layout in layouts])])


def _scenes(layouts: Sequence[VisualLayout], encoder: str) -> tuple[Tensor, Tensor]:
    """For every row of an encoder's pixels, the number of its visual ``(V,)`` and its place among the tiles ``(V, 2)``."""
    counts = [layout.rows_of(encoder) for layout in layouts]
    places = [
        place
        for layout, count in zip(layouts, counts, strict=True)
        for place in (layout.places if count == layout.num_views else ((-1, -1),) * count)
    ]
    scenes = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    return scenes, torch.tensor(places, dtype=torch.long).view(-1, 2)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 spreads the module's weights over the ranks."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def build_visual_parts(config: MllmConfig) -> tuple[EncoderBank | None, nn.Module | None]:
    """Encoder bank and connector of an `MllmConfig`; both None for a text-only model."""
    if config.connector is None:
        return None, None
    width = config.get_text_config().hidden_size
    bank = EncoderBank(config.encoders, config.router, text_width=width)
    connector = build_connector(connector_config(config.connector), bank.infos, width)
    rules = config.layout_rules()
    if rules.newlines:
        connector.add_newline()
    if rules.opening:
        connector.add_opening()
    bank.with_attention = frozenset(connector.attention_from(connector.config, bank.infos))
    return bank, connector


def home_of(parameter: Tensor, visitor: Tensor) -> torch.device:
    """Where a tensor goes to meet a weight: to its device; offloaded weights (accelerate's) are fetched to their visitors."""
    return visitor.device if parameter.is_meta else parameter.device


def fetched(module: nn.Module) -> ExitStack:
    """While entered, offloaded weights of every submodule are there: accelerate fetches them for a module's ``forward``, and
    libraries of encoders read some elsewhere."""
    stack = ExitStack()
    offloaded = [m for m in module.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    if offloaded:
        from accelerate.utils import align_module_device

        for part in offloaded:
            stack.enter_context(align_module_device(part))
    return stack


def build_own_tokenizer(config: MllmConfig) -> nn.Module | None:
    """The visual tokenizer of an `MllmConfig`; None without one, or where an encoder's is used."""
    if config.visual_tokenizer is None or reader_of(config.visual_tokenizer) is not None:
        return None
    from mllm.visual_tokenizers.base import build_tokenizer

    return build_tokenizer(config.visual_tokenizer)
