"""What is a vision encoder here, and which are built in?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, VisionFeatures, WeightsSource


class Reads(StrictModel):
    """Whose features an encoder is given."""

    encoder: str
    """Another encoder of the model."""
    width: int | None = Field(default=None, gt=0)
    """D of its features; filled in by the model."""
    grid: Grid | None = None
    """Of its features; filled in by the model."""


class EncoderConfig(StrictModel):
    """What every encoder's config has. A resolved config is self-sufficient: it opens offline and never reads a hub."""

    type: str
    weights: WeightsSource | None = None
    """None: no published weights (trained from scratch)."""
    capability: str = ""
    """One short sentence on what the encoder is good at; a router reads it."""
    layers: list[int] = Field(default=[-1], min_length=1)
    """Feature layers, concatenated on channels in this order. Counted like HF hidden states: -1 is the last block's
    output, -2 the block before it; a non-negative k is the output after k blocks (0: the embeddings)."""
    keep_prefix: bool = False
    """Return class and register tokens in `VisionFeatures.prefix`."""
    final_norm: bool = True
    """Apply the encoder's own last norm to the output of the last block (only where that layer is taken)."""
    reads: Reads | None = None
    """Another encoder of the model, by name, whose features this one reads in place of its own patch embedding (type vggt); default:
    it reads pixels."""
    info: EncoderInfo | None = None
    """Filled by `VisionEncoder.resolve`; never written by hand."""

    @field_validator("reads", mode="before", json_schema_input_type=str | Reads | None)
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"encoder": value} if isinstance(value, str) else value

    @property
    def resolved_info(self) -> EncoderInfo:
        """`info`, of a config that is resolved."""
        assert self.info is not None, f"config of encoder {self.type} is not resolved"
        return self.info

    def check_frames(self, frames: int, name: str) -> None:
        """Raise `ConfigError` where an encoder that reads the frames of a video together cannot take so many.

        Args:
            frames: the most that it is given of a video; 0: the model takes none.
            name: the encoder's own in its model.
        """


def grid_without_blocks(config: EncoderConfig, image: ImageSpec, size: int) -> Grid:
    """The grid of an encoder that has no blocks, its settings checked.

    Args:
        config: the encoder's config.
        image: what it sees.
        size: pixels of a patch's side.

    Returns:
        Rows and columns of patches.

    Raises:
        ConfigError: patches do not fit, or settings choose among blocks or prefix tokens.
    """
    if image.height % size or image.width % size:
        raise ConfigError(f"patch_size: {size} does not divide image_size ({image.height}, {image.width})")
    if config.layers != [-1]:
        raise ConfigError(f"layers: {config.type} has no blocks, so layers stays [-1] (got {config.layers})")
    if config.keep_prefix:
        raise ConfigError(f"keep_prefix: {config.type} has no class or register tokens; remove the key")
    return image.height // size, image.width // size


class VisionEncoder(nn.Module):
    """Pixels of one encoder's own size to a feature grid.

    ``__init__`` builds on the meta device and touches neither disk nor network; `load_pretrained` does that, once.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[EncoderConfig]] = EncoderConfig
    config: EncoderConfig
    reads_features: ClassVar[bool] = False
    """It can be given another encoder's features (``config.reads``): `forward` then takes them as ``given``."""
    joins_views: ClassVar[bool] = False
    """Views of one picture see each other: `forward` is given ``scene_ids``, and ``places`` ``(B, 2)``, each view's (row,
    column) among the tiles, (-1, -1) for a whole picture."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        # `from_pretrained` gives only modules with a tensor of their own the chance to restore their buffers.
        self.register_buffer("has_lost_buffers", torch.empty(0), persistent=False)

    @property
    def volume_depth(self) -> int | None:
        """Slices that one token of a volume holds, where images of one scene are the slices of a volume; None: they are pictures."""
        return None

    @classmethod
    def resolve(cls, config: EncoderConfig) -> Any:
        """The same config with everything that follows from it written out (`info` above all). May import the library the encoder comes
        from; loads no weights.

        Args:
            config: the encoder's config.

        Returns:
            A config that builds the same encoder without that library's catalogue.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, config: EncoderConfig) -> EncoderInfo:
        """Sizes of a config.

        Args:
            config: the encoder's config, resolved or not.

        Returns:
            What the encoder takes and gives; agrees with `forward` (contract-tested).
        """
        return (cls.resolve(config) if config.info is None else config).resolved_info

    def load_pretrained(self) -> None:
        """Load the weights that ``config.weights`` names. Raises `CheckpointError` or `UnavailableError`, naming the
        source."""
        raise NotImplementedError

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """``(group name, parameter-name prefixes)`` from input to output: ``embeddings``, ``layers.0`` … ``norm``.
        Every parameter is in exactly one group; partial unfreezing and layer-wise rates use it."""
        raise NotImplementedError

    def restore_buffers(self) -> None:
        """Recompute buffers that are not saved (positions, rotary tables), lost when a model is built on the meta
        device."""

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations; nothing to do for encoders without blocks.

        Args:
            enabled: whether to.
        """

    def last_cost(self) -> dict[str, float]:
        """Of an encoder whose work differs from call to call: what an image of the last call cost on average (``gflops``, and how
        it was chosen). Empty for all others."""
        return {}

    def losses(self) -> dict[str, Tensor]:
        """Losses of its own of the last call in training, means over that call's images, which the model adds to its loss. Most
        encoders have none."""
        return {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The smallest useful config as plain data, for contract tests: from scratch, offline, under a second."""
        raise NotImplementedError

    def forward(
        self, pixels: Tensor, *, scene_ids: Tensor | None = None, return_attention: bool = False
    ) -> VisionFeatures:
        """Pixels to features; B = 0 is legal.

        Args:
            pixels: ``(B, 3, H, W)``, resized and normalised as ``info.image`` says. An encoder whose ``info.image.patch`` is set takes
                ``grids`` too: pixels are then patches ``(ΣN, 3 p²)`` of images with these grids.
            scene_ids: ``(B,)``; images with the same id show one scene (multi-view encoders use it, others ignore it).
            return_attention: also give the last attention map, where the encoder has one.

        Returns:
            Tokens ``(B, N, D)`` in raster order with their grid, and what lies beside them.
        """
        raise NotImplementedError
