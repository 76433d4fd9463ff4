"""What does an encoder-free model see? The pixels of each patch, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from mllm.encoders.base import EncoderConfig, VisionEncoder, grid_without_blocks
from mllm.encoders.library import ImageEncoderConfig, check_patches, check_pixels
from mllm.errors import CheckpointError, UnavailableError
from mllm.types import EncoderInfo, Grid, ImageSpec, VisionFeatures


class RawPatchesConfig(ImageEncoderConfig):
    """Patches of pixels without any parameter (Fuyu; SOLO, arXiv 2407.06438)."""

    patch_size: int = Field(default=32, gt=0)
    image_size: int | tuple[int, int] | None = 448


class RawPatches(VisionEncoder):
    """p × p patches as vectors of ``3 p²`` numbers, channel first: all of red, then green, then blue, each row by
    row."""

    Config: ClassVar[type[EncoderConfig]] = RawPatchesConfig
    config: RawPatchesConfig

    def __init__(self, config: RawPatchesConfig):
        super().__init__(config if config.info is not None else self.resolve(config))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "raw_patches", "patch_size": 4, "image_size": [8, 12]}

    @classmethod
    def resolve(cls, config: RawPatchesConfig) -> Any:
        image = config.image(ImageSpec(height=448, width=448))
        size = config.patch_size
        grid = grid_without_blocks(config, image, size)
        image = image.model_copy(update={"patch": size})
        info = EncoderInfo(image=image, grid=grid, width=3 * size * size)
        return config.model_copy(update={"info": info})

    def load_pretrained(self) -> None:
        raise CheckpointError("raw_patches has no weights to load; remove weights from its config")

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        return []

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        return_attention: bool = False,
        grids: Sequence[Grid] | None = None,
    ) -> VisionFeatures:
        if return_attention:
            raise UnavailableError("return_attention: raw_patches has no attention")
        info, size = self.config.resolved_info, self.config.patch_size
        if grids is not None:
            check_patches(pixels, grids, info.image, self.config.type)
            return VisionFeatures(pixels[None], (1, len(pixels)), grids=tuple(grids))
        check_pixels(pixels, info.image, self.config.type)
        rows, cols = info.grid
        patches = pixels.reshape(pixels.shape[0], 3, rows, size, cols, size).permute(0, 2, 4, 1, 3, 5)
        return VisionFeatures(patches.reshape(pixels.shape[0], rows * cols, 3 * size * size), info.grid)
