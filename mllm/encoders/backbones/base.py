"""What do the research backbones have in common: published weights, batch norms, stages of a pyramid?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.layers import BATCH_NORMS, IMAGENET, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import ImageEncoderConfig, LayerOutput, LibraryEncoder, take_layers
from mllm.encoders.weights import load_exactly, local_path, read_weights, strip_prefix, unavailable
from mllm.errors import CheckpointError, ConfigError
from mllm.types import ImageSpec

_HUB_FILE = re.compile(r"(?P<repository>[\w-]+/[\w.-]+)/(?P<file>.+\.(?:safetensors|pth|pt|bin))")


class BackboneConfig(ImageEncoderConfig):
    """Settings of every research backbone."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth in training: the last block's rate, growing linearly from 0."""
    train_batch_norm: bool | None = None
    """Update batch norms' running statistics while the encoder learns. Default: only from scratch (no ``weights``);
    with the few images of a multimodal batch, published statistics are better kept."""


class PanelConfig(BackboneConfig):
    """Settings of a backbone that sees more than three channels."""

    panels: int = Field(default=1, ge=1)
    """RGB pictures under one another that an image file brings, three channels each (`mllm.processing.panels`); ``image_size``,
    ``mean`` and ``std`` are of each."""

    def image(self, default: ImageSpec) -> ImageSpec:
        one = super().image(default)
        return one.model_copy(update={"height": one.height * self.panels, "panels": self.panels})


def planes_of(pixels: Tensor, panels: int) -> Tensor:
    """``(B, 3, panels · H, W)`` → ``(B, 3 · panels, H, W)``."""
    return pixels.unflatten(2, (panels, -1)).transpose(1, 2).flatten(1, 2)


class BackboneEncoder(LibraryEncoder):
    """A backbone built here. Its weights come from a local file or a hub's ``owner/name/file``, in this module's names
    or the authors'."""

    Config: ClassVar[type[EncoderConfig]] = BackboneConfig
    config: BackboneConfig

    @classmethod
    def default_image(cls, config: BackboneConfig) -> ImageSpec:
        return ImageSpec(height=224, width=224, **IMAGENET)

    @classmethod
    def published_names(cls, config: BackboneConfig) -> set[str]:
        """Names of everything a checkpoint of this family may hold, with the parts that the config leaves out."""
        with torch.device("meta"):
            return set(cls.build(config.model_copy(update={"layers": [-1], "final_norm": True})).state_dict())

    @classmethod
    def absent(cls, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this model has and some published checkpoints rightly lack, with its neutral value."""
        counters = [key for key in own if key.endswith("num_batches_tracked") and key not in state]
        return {key: torch.zeros((), dtype=torch.long) for key in counters}

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
        """A published state dict in this module's names, below whatever prefix it has; one in this module's names stays
        as it is."""
        return state

    @property
    def recompute(self) -> bool:
        return self.training and getattr(self, "gradient_checkpointing", False)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        learns = self.config.train_batch_norm
        if mode and not (self.config.weights is None if learns is None else learns):
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self

    def load_pretrained(self) -> None:
        weights = self.required_weights()
        names, own = self.published_names(self.config), self.model.state_dict()
        state = self.translate(read_weights(self._file(weights.source, weights.revision)), self.config)
        if not set(own) <= set(state):
            state = strip_prefix(state, names)
        state |= self.absent(state, own)
        load_exactly(self.model, state, source=weights.source, known=names)

    def _file(self, source: str, revision: str | None) -> Path:
        match = _HUB_FILE.fullmatch(source)
        if match is None or Path(source).expanduser().exists():
            path = local_path(source)
            if path is None:
                raise CheckpointError(
                    f"weights: {source!r} is no local file. Set weights.source to the file that holds the authors' "
                    "weights, or to owner/name/file on a hub"
                )
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(match["repository"], match["file"], revision=revision))
        except Exception as error:
            raise unavailable(source, error) from error


class Pyramid(nn.Module):
    """Stages of blocks on maps whose channels come last: ``(B, rows, cols, C)``.

    Only the first ``num_stages`` exist, and the last norm only where it is applied; blocks have no arguments beside the
    map.
    """

    num_stages: int
    norm: nn.Module | None
    recompute = False

    def entry(self, stage: int) -> nn.Module:
        """What stands before the blocks of a stage: the stem on ``(B, 3, H, W)``, or the downsampling on maps."""
        raise NotImplementedError

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        raise NotImplementedError

    def output(self, stage: int, x: Tensor) -> Tensor:
        """What is handed out of a stage's last map; the next stage goes on from the map itself."""
        return x

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """The map of every stage after its last block, and the last norm's output where there is one."""
        x, maps = pixels, []
        for stage in range(self.num_stages):
            x = self.entry(stage)(x)
            for block in self.blocks(stage):
                x = run(block, x, recompute=self.recompute)
            maps.append(self.output(stage, x))
        return maps if self.norm is None else [*maps, self.norm(x)]


class PyramidEncoder(BackboneEncoder):
    """A backbone of four stages. ``layers`` counts stages: [-1] is the last one, [-2] the one before with twice the rows
    and columns; several are fused on channels, on the grid of the last one named ([-1, -2]: the finer grid)."""

    model: Pyramid
    num_stages: ClassVar[int] = 4

    @classmethod
    def stages_needed(cls, config: BackboneConfig) -> tuple[int, bool]:
        """How many stages run, and whether the last norm does."""
        needed = max(take_layers(config.layers, cls.num_stages, lowest=1))
        return needed, config.final_norm and needed == cls.num_stages

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        counts = take_layers(self.config.layers, self.num_stages, lowest=1)
        self.model.recompute = self.recompute
        maps = self.model(pixels)
        # A fifth map is the fourth after the last norm.
        chosen = [maps[-1] if count == self.num_stages else maps[count - 1] for count in counts]
        return [LayerOutput(x.flatten(1, 2), (x.shape[1], x.shape[2])) for x in chosen]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """Blocks are the layers; what stands before a stage goes with its first block."""
        paths = {module: f"{path}." for path, module in self.named_modules()}
        groups, layers = [("embeddings", [paths[self.model.entry(0)]])], 0
        for stage in range(self.model.num_stages):
            for i, block in enumerate(self.model.blocks(stage)):
                before = [paths[self.model.entry(stage)]] if stage and i == 0 else []
                groups.append((f"layers.{layers}", [*before, paths[block]]))
                layers += 1
        inside = tuple(prefix for _, prefixes in groups for prefix in prefixes)
        norms = [name for name, _ in self.named_parameters() if not name.startswith(inside)]
        return [*groups, ("norm", norms)] if norms else groups


def require_multiple(image: ImageSpec, multiple: int, why: str) -> None:
    """Raise `ConfigError` unless ``multiple`` divides both sides; says the nearest size that would do."""
    if image.height % multiple == 0 and image.width % multiple == 0:
        return
    near = [max(round(side / multiple), 1) * multiple for side in (image.height, image.width)]
    raise ConfigError(
        f"image_size: {image.height} x {image.width} is no multiple of {multiple} ({why}); the nearest is "
        f"{near[0]} x {near[1]}"
    )
