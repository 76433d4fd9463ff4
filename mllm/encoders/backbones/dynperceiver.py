"""What does Dynamic Perceiver see: latents that read a CNN stage by stage, and stop early where they are sure (arXiv 2306.11248)?"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.dynperceiver_cnn import authors_names, cut_cnn, last_widths
from mllm.encoders.backbones.dynperceiver_exits import Exits
from mllm.encoders.backbones.layers import BATCH_NORMS, Mlp, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.costs import gflops
from mllm.encoders.library import LayerOutput, map_to_tokens
from mllm.errors import ConfigError

Four = tuple[int, int, int, int]
_DEPTHS = (3, 3, 9, 3)
_POOLED = 7
_EARLY, _LAST = 3, 4


class DynPerceiverConfig(BackboneConfig):
    """Dynamic Perceiver on a CNN; defaults are the authors' with ResNet-50 and 128 latents."""

    cnn: Literal[
        "resnet18", "resnet34", "resnet50",
        "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf",
        "mobilenet_v3_large",
    ] = "resnet50"  # fmt: skip
    """The authors' ResNets, RegNets of 400 MF to 3.2 GF and MobileNet V3, by torchvision's names."""
    cnn_width: float = Field(default=1.0, gt=0)
    """Times all channels of a ResNet or MobileNet; the authors' have 0.375 to 0.75, and 0.5 to 2."""
    cnn_depths: Four | None = None
    """Blocks of a ResNet's stages. Default: its own."""
    cnn_channels: Four | None = None
    """Inner channels of a ResNet's stages. Default: its own (64 to 512)."""
    num_latents: int = Field(default=128, ge=8)
    """Latents of the first stage; half as many in each later one."""
    depth_factor: Four = (1, 1, 1, 1)
    """Times 3, 3, 9 and 3 self-attention layers in the four stages."""
    num_heads: Four = (1, 2, 4, 8)
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Of self-attention layers; cross attentions have 1."""
    output: Literal["latents", "map"] = "latents"
    """latents: the last stage's, N / 8 tokens in one row, which may stop early. map: the CNN's last map after it has read them."""
    exit: Literal[3, 4] = 4
    """The deepest latents that run; after 3 what is left of the encoder is two linear layers."""
    budget: float | None = Field(default=None, gt=0)
    """GFLOPs an image may cost, in place of ``exit``: the deepest exit within it is taken."""
    confidence: float | None = Field(default=None, gt=0, le=1)
    """In evaluation an image stops after stage 3 when the published classifier there gives its best class this probability."""
    classifier: bool = False
    """Build that classifier though no confidence is set: a stage of kind ``exits`` teaches it. With it, ``confidence`` needs no
    published weights."""
    num_classes: int = Field(default=1000, ge=2)
    """Classes of that classifier; where neither ``confidence`` nor ``classifier`` is set it is not built."""


class Attention(nn.Module):
    """Queries ``(B, Q, C)`` to keys and values ``(B, K, C')``, projected to ``inner`` channels.

    places: keys that lie on a map get a learned summand each, after their projection.
    """

    def __init__(self, width: int, kv_width: int, inner: int, num_heads: int, places: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(kv_width, inner, bias=False)
        self.v_proj = nn.Linear(kv_width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width)
        if places:
            self.relative_position_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, inner), std=0.02))
        self.places = places

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(read), self.v_proj(read)
        if self.places:
            k = k + self.relative_position_bias
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossRead(nn.Module):
    def __init__(self, width: int, kv_width: int, inner: int, num_heads: int, places: int):
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(width), nn.LayerNorm(kv_width)
        self.attention = Attention(width, kv_width, inner, num_heads, places)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return x + self.attention(self.q_norm(x), self.kv_norm(read))


class NormedMlp(Mlp):
    def __init__(self, width: int, ratio: float):
        super().__init__(width, int(width * ratio))
        self.layernorm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.layernorm(x))


class CrossLayer(nn.Module):
    """``(B, Q, C)`` reads ``(B, K, C')``."""

    def __init__(self, width: int, kv_width: int, inner: int, places: int = 0):
        super().__init__()
        self.cross_attn = CrossRead(width, kv_width, inner, 1, places)
        self.mlp = NormedMlp(width, 1.0)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return self.mlp(self.cross_attn(x, read))


class SelfRead(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed)


class Block(nn.Module):
    """Self attention of latents ``(B, N, C)``."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.self_attn = SelfRead(width, num_heads)
        self.mlp = NormedMlp(width, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.self_attn(x))


def mix(latents: Tensor, mixer: nn.Module, expander: nn.Module) -> Tensor:
    """``(B, N, C)`` → ``(B, N / 2, C')``: mixed over latents, then widened."""
    return expander(mixer(latents.transpose(1, 2)).transpose(1, 2))


class DynPerceiver(nn.Module):
    """Pixels to latents and the CNN's map, under the authors' names, without what lies behind the deepest exit."""

    recompute = False

    def __init__(self, config: DynPerceiverConfig):
        super().__init__()
        self.is_map = config.output == "map"
        self.deepest = _LAST if self.is_map else config.exit
        self.confidence = config.confidence
        stem, stages, widths = cut_cnn(config)
        self.widths = widths
        counts = [config.num_latents >> s for s in range(4)]
        self.latent = nn.Parameter(nn.init.trunc_normal_(torch.empty(counts[0], widths[0]), std=0.02))
        self.cnn_stem = stem
        runs = self.deepest if self.is_map else self.deepest - 1
        for s in range(runs):
            self.add_module(f"cnn_body_stage{s + 1}", stages[s])
        for s in range(self.deepest):
            self._add_stage(config, s, widths)
        steps = range(3)
        self.token_mixer = nn.ModuleList(_change(counts[s], counts[s + 1]) for s in steps)
        self.token_expander = nn.ModuleList(_change(widths[s], widths[s + 1]) for s in steps)
        if self.is_map:
            self.last_cross_att_z2x = CrossLayer(widths[4], widths[3], widths[4] // 8)
        if self.confidence is not None or config.classifier:
            self.early_classifier3 = nn.Linear(widths[2], config.num_classes)
        for name, module in self.named_children():
            if not name.startswith("cnn"):
                module.apply(init_linear)

    def _add_stage(self, config: DynPerceiverConfig, s: int, widths: list[int]) -> None:
        width, number = widths[s], s + 1
        if width % config.num_heads[s]:
            raise ConfigError(f"num_heads: {config.num_heads[s]} do not divide the {width} channels of stage {number}")
        self.add_module(f"dwc{number}_x2z", nn.Conv2d(width, width, 7, padding=3, groups=width))
        self.add_module(f"cross_att{number}_x2z", CrossLayer(width, width, width, places=_POOLED**2))
        if s:
            self.add_module(f"cross_att{number}_z2x", CrossLayer(width, width, width // 8))
        depth = _DEPTHS[s] * config.depth_factor[s]
        layers = (Block(width, config.num_heads[s], config.mlp_ratio) for _ in range(depth))
        self.add_module(f"self_att{number}", nn.ModuleList(layers))

    def exchange(self, number: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(B, C, rows, cols)`` reads the latents ``(B, N, C)`` of stage ``number``, then they read it."""
        if number > 1:
            read = getattr(self, f"cross_att{number}_z2x")(x.flatten(2).transpose(1, 2), z)
            x = read.transpose(1, 2).unflatten(2, x.shape[2:])
        seen = F.adaptive_avg_pool2d(x + getattr(self, f"dwc{number}_x2z")(x), _POOLED)
        z = getattr(self, f"cross_att{number}_x2z")(z, seen.flatten(2).transpose(1, 2))
        for block in getattr(self, f"self_att{number}"):
            z = run(block, z, recompute=self.recompute)
        return x, z

    def stage(self, number: int, x: Tensor) -> Tensor:
        """The CNN's stage. Batch norms that learn would count recomputed images twice."""
        body = getattr(self, f"cnn_body_stage{number}")
        counts = any(m.training for m in self.cnn_stem.modules() if isinstance(m, BATCH_NORMS))
        return run(body, x, recompute=self.recompute and not counts)

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The map at the entry of stage 3 after its exchange, and the latents of stage 3."""
        x, z = self.cnn_stem(pixels), self.latent.expand(len(pixels), -1, -1)
        for number in (1, 2, 3):
            if number > 1:
                z = self.mixed(z, number)
            x, z = self.exchange(number, x, z)
            if number < _EARLY:
                x = self.stage(number, x)
        return x, z

    def mixed(self, z: Tensor, number: int) -> Tensor:
        """Latents of a stage as they enter the next one, ``number``."""
        return mix(z, self.token_mixer[number - 2], self.token_expander[number - 2])

    def finish(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map and latents of stage 4 from those that `read` gives."""
        return self.exchange(_LAST, self.stage(_EARLY, x), self.mixed(z, _LAST))

    def last_map(self, x: Tensor, z: Tensor, last: Tensor | None = None) -> Tensor:
        """The CNN's last map ``(B, C, rows, cols)`` after it has read the latents; last: it, where it is known."""
        x = self.stage(_LAST, x) if last is None else last
        read = self.last_cross_att_z2x(x.flatten(2).transpose(1, 2), z)
        return read.transpose(1, 2).unflatten(2, x.shape[2:])

    def sure(self, z: Tensor) -> Tensor:
        """``(B,)``: which images' latents of stage 3 are confident enough to stop there."""
        probability = self.early_classifier3(z.mean(1)).float().softmax(-1).amax(-1)
        return probability >= self.confidence


def _change(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(before), nn.Linear(before, after))


@cache
def _exit_costs(settings: str) -> dict[int, float]:
    """GFLOPs of an image that stops at each exit, of a config as JSON."""
    config = DynPerceiverConfig.model_validate_json(settings)
    found = {}
    for number in (_EARLY, _LAST):
        with torch.device("meta"):
            model = DynPerceiver(config.model_copy(update={"exit": number})).eval().requires_grad_(False)
        size = (1, 3, config.info.image.height, config.info.image.width)  # type: ignore[union-attr]
        found[number] = gflops(lambda pixels, m=model: _latents(m, pixels), size)
    return found


def _latents(model: DynPerceiver, pixels: Tensor) -> Tensor:
    x, z = model.read(pixels)
    return model.finish(x, z)[1] if model.deepest == _LAST else model.mixed(z, _LAST)


class DynPerceiverEncoder(BackboneEncoder):
    """Latents as tokens. An image that stops after stage 3 gives latents of the same shape: those of stage 3 as they would enter
    stage 4. ``last_cost`` tells what the images of the last call cost."""

    Config: ClassVar[type[EncoderConfig]] = DynPerceiverConfig
    config: DynPerceiverConfig
    model: DynPerceiver

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "dynperceiver",
            "cnn": "resnet18",
            "cnn_depths": [1, 1, 1, 1],
            "cnn_channels": [8, 8, 16, 16],
            "num_latents": 32,
            "num_heads": [1, 1, 2, 2],
            "mlp_ratio": 1.0,
            "output": "map",
            "image_size": [64, 96],
        }

    @classmethod
    def build(cls, config: DynPerceiverConfig) -> DynPerceiver:
        if config.num_latents % 8:
            raise ConfigError(f"num_latents: {config.num_latents} is no multiple of 8; it is halved three times")
        if config.layers != [-1]:
            raise ConfigError("layers: choose the depth of this encoder with exit or budget; layers is [-1]")
        early = config.exit == _EARLY or config.budget is not None or config.confidence is not None
        if config.output == "map" and early:
            raise ConfigError(
                "output: the map is there at the end only; set output: latents for exit, budget or confidence"
            )
        if config.confidence is not None and config.weights is None and not config.classifier:
            raise ConfigError(
                "confidence: the exit's classifier has random weights here; name published weights, teach it in a stage of kind exits "
                "(classifier: true), or set exit: 3"
            )
        if config.info is not None:
            require_multiple(config.info.image, 32, "stages halve the map exactly")
        return DynPerceiver(config.model_copy(update={"exit": cls.deepest(config)}))

    @classmethod
    def exit_costs(cls, config: DynPerceiverConfig) -> dict[int, float]:
        """GFLOPs of an image at each exit, of a resolved config."""
        plain = config.model_copy(
            update={"budget": None, "confidence": None, "weights": None, "exit": _LAST, "classifier": False}
        )
        return _exit_costs(plain.model_dump_json())

    @classmethod
    def deepest(cls, config: DynPerceiverConfig) -> int:
        """The exit that the budget allows, or the config's own."""
        if config.budget is None or config.info is None:
            return config.exit
        costs = cls.exit_costs(config)
        within = [number for number, cost in costs.items() if cost <= config.budget]
        if not within:
            shown = ", ".join(f"{cost:.3g} for exit {number}" for number, cost in costs.items())
            raise ConfigError(f"budget: {config.budget:g} GFLOPs an image are too few; this encoder needs {shown}")
        return max(within)

    @classmethod
    def published_names(cls, config: DynPerceiverConfig) -> set[str]:
        whole = {"output": "map", "exit": _LAST, "budget": None, "confidence": 0.5}
        with torch.device("meta"):
            names = set(DynPerceiver(config.model_copy(update=whole)).state_dict())
            names |= set(Exits(cut_cnn(config)[2], config.num_classes, last_widths(config)).state_dict())
        return names

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: DynPerceiverConfig) -> dict[str, Tensor]:
        return authors_names(state)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        model = self.model
        model.recompute = self.recompute
        x, z = model.read(pixels)
        if model.is_map:
            x, z = model.finish(x, z)
            return [map_to_tokens(model.last_map(x, z))]
        asks = model.confidence is not None and not self.training and not pixels.is_meta
        tokens = self._finish(x, z, model.sure(z) if asks and model.deepest == _LAST else None)
        return [LayerOutput(tokens, (1, tokens.shape[1]))]

    def _finish(self, x: Tensor, z: Tensor, stops: Tensor | None) -> Tensor:
        """Latents of the images that stop, as they are; the others' after the last stage. stops ``(B,)``; None: none was asked, so
        nothing waits for the GPU's word."""
        model = self.model
        if model.deepest == _EARLY:
            self._stopped = None
            return model.mixed(z, _LAST)
        if stops is None or not (stopped := int(stops.sum())):
            self._stopped = torch.zeros(len(z), dtype=torch.bool)
            return model.finish(x, z)[1]
        self._stopped = stops.cpu()
        early = model.mixed(z, _LAST)
        if stopped < len(z):
            early = early.index_copy(0, (~stops).nonzero()[:, 0], model.finish(x[~stops], z[~stops])[1])
        return early

    def last_cost(self) -> dict[str, float]:
        """Of the images of the last call: ``gflops`` each on average, and the ``early`` share that stopped after stage 3."""
        costs = self.exit_costs(self.config)
        if self.model.is_map:
            return {}
        stopped = getattr(self, "_stopped", None)
        share = 1.0 if self.model.deepest == _EARLY else 0.0 if stopped is None else float(stopped.float().mean())
        return {"gflops": share * costs[_EARLY] + (1 - share) * costs[_LAST], "early": share}

    def logits(self, pixels: Tensor, exits: Exits) -> dict[str, Tensor]:
        """``(B, classes)`` of every exit, of an encoder with ``output: map`` and ``classifier: true``."""
        model = self.model
        model.recompute = self.recompute
        x, z = model.read(pixels.to(self.dtype))
        early = model.early_classifier3(z.mean(1))
        x, z = model.finish(x, z)
        last = model.stage(_LAST, x)
        return exits(early, z, last, model.last_map(x, z, last))

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """A stage is a layer: the CNN's and the latents' together."""
        names = [name for name, _ in self.named_parameters()]
        stages = {}
        for s in range(1, self.model.deepest + 1):
            own = [f"model.{part}" for part in (f"cnn_body_stage{s}.", f"dwc{s}_", f"cross_att{s}_", f"self_att{s}.")]
            if s > 1:
                own += [f"model.token_mixer.{s - 2}.", f"model.token_expander.{s - 2}."]
            stages[s] = own
        if self.model.deepest == _EARLY:
            stages[_EARLY] += ["model.token_mixer.2.", "model.token_expander.2."]
        stages[_EARLY].append("model.early_classifier3.")
        stages[self.model.deepest].append("model.last_cross_att_z2x.")
        grouped = [
            (f"layers.{s - 1}", [p for p in own if any(n.startswith(p) for n in names)]) for s, own in stages.items()
        ]
        return [("embeddings", ["model.latent", "model.cnn_stem."]), *grouped]
