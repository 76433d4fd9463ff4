"""How does a model that segments and draws edit a picture: mark what changes, draw what it becomes, paint that inside the mark (FOCUS)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError
from mllm.heads.base import MultimodalModel
from mllm.heads.codes.generate import generate_images, to_pil
from mllm.processing.images import image_size, load_image
from mllm.processing.protocol import Processor
from mllm.types import IMAGE_MARK, Turn
from mllm.visual_tokenizers.base import VisualTokenizer, as_unit_range
from mllm.visual_tokenizers.diffusion.edit import edit
from mllm.visual_tokenizers.images import to_pixels
from mllm.visual_tokenizers.painting import Painting
from mllm.visual_tokenizers.sequence import code_blocks, decode_packed, pack_codes, unpack_codes


class EditingModel(MultimodalModel, Protocol):
    """A model that marks and draws."""

    def segment(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass
class Edited:
    """pixels ``(3, H, W)`` in [0, 1]: the edited picture, at the size that the model draws; mask ``(H, W)`` bool: what was painted anew;
    text: what the model said changes; packed ``(S,)``: the codes it drew."""

    pixels: Tensor
    mask: Tensor
    text: str
    packed: Tensor

    def pil(self) -> Any:
        """The picture as PIL's."""
        return to_pil(self.pixels[None])[0]


@torch.no_grad()
def edit_pictures(
    model: EditingModel,
    images: Sequence[Any],
    instructions: Sequence[str],
    *,
    processor: Processor,
    masks: Tensor | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    feather: int = 0,
    threshold: float | None = None,
    **options: Any,
) -> list[Edited]:
    """Pictures changed as instructions say; what the model does not mark stays as it was, pixel by pixel. Codes whose cells a mark touches
    are the drawn ones, the others the source's own (a multi-scale tokenizer's are all drawn).

    Args:
        model: one with a segmentation head and a head that draws.
        images: pictures (paths, PIL, arrays, bytes).
        instructions: what to change, one for each. The mask is asked for in the segmentation head's own question, with the instruction
            in the place of a phrase; the codes are drawn for the instruction itself.
        processor: the model's own.
        masks: ``(B, H, W)``, what to paint anew in place of what the model marks, at the size that the model draws.
        steps: denoising steps of the diffusion decoder; default: its own.
        guidance: its scale; default: its own.
        seed: of its noise.
        feather: pixels around the mask over which old and new are mixed.
        threshold: probability above which a pixel is marked; default: the segmentation head's own.
        options: of the drawing, as `generate_images` takes them.

    Returns:
        One result a picture.

    Raises:
        ConfigError: the model marks or draws nothing, or its visual tokenizer has no diffusion decoder and ``steps`` was given.
    """
    if len(images) != len(instructions):
        raise ConfigError(f"edit: {len(instructions)} instructions for {len(images)} pictures; give one for each")
    side = side_of(model)
    squares = [_square(image, side, f"picture {k}") for k, image in enumerate(images)]
    found = model.segment(list(images), list(instructions), processor=processor, threshold=threshold)
    prompts = [[Turn("user", f"{IMAGE_MARK}\n{instruction}")] for instruction in instructions]
    shown = [[image] for image in images]
    pixels = torch.cat([to_pixels(one, model.device) for one in squares])
    if masks is None:
        masks = torch.stack([_shrunk(part.union, side) for part in found])
    masks = masks.to(model.device).bool()
    touched = touched_codes(model.image_tokenizer, masks)
    settings = {"temperature": 0.0, "painting": Painting("plain"), **options}  # only its codes are used
    drawn = generate_images(model, prompts, processor=processor, images=shown, changed=touched, **settings)
    made = _painted(model, pixels, masks, drawn.packed, touched, steps, guidance, seed, feather)
    texts = [part.text for part in found]
    return [Edited(p, m, text, codes) for p, m, text, codes in zip(made, masks, texts, drawn.packed)]


def side_of(model: MultimodalModel) -> int:
    """Rows and columns of the pictures that a model draws."""
    tokenizer = model.image_tokenizer
    return tokenizer.diffusion.image_side if tokenizer.has_diffusion else tokenizer.image.height


def touched_codes(tokenizer: VisualTokenizer, masks: Tensor) -> Tensor:
    """Which codes ``(B, S)`` stand for cells that masks ``(B, H, W)`` touch; of a multi-scale tokenizer, whose coarse codes stand for no
    cells, all."""
    blocks = code_blocks(tokenizer)
    if tokenizer.scales is not None:
        return masks.new_ones(len(masks), sum(block.number for block in blocks), dtype=torch.bool)
    touched = [F.adaptive_max_pool2d(masks[:, None].float(), (b.rows, b.columns)).flatten(1) > 0 for b in blocks]
    return torch.cat(touched, 1)


def _painted(
    model: MultimodalModel,
    pixels: Tensor,
    masks: Tensor,
    packed: Tensor,
    touched: Tensor,
    steps: int | None,
    guidance: float | None,
    seed: int,
    feather: int,
) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [0, 1]: inside the masks ``(B, H, W)`` by drawn codes ``(B, S)`` in touched cells and the source's own
    elsewhere, outside as in pixels ``(B, 3, H, W)`` in [-1, 1]."""
    tokenizer = model.image_tokenizer
    if not touched.all():
        seen = tokenizer.diffusion.shrunk(pixels) if tokenizer.has_diffusion else pixels
        packed = torch.where(touched, packed, pack_codes(tokenizer, tokenizer.encode(seen)))
    if tokenizer.has_diffusion:
        codes = unpack_codes(tokenizer, packed)
        made = edit(
            tokenizer.diffusion, pixels, masks, codes, steps=steps, guidance=guidance, seed=seed, feather=feather
        )
        return as_unit_range(made)
    if steps is not None or guidance is not None:
        raise ConfigError("edit: steps and guidance are the diffusion decoder's, and this model's tokenizer has none")
    plain = decode_packed(tokenizer, packed)  # what the plain decoder makes, where the mask is
    return torch.where(masks[:, None], plain, as_unit_range(pixels))


def _square(image: Any, side: int, where: str) -> Tensor:
    """A picture ``(1, 3, side, side)`` uint8. Raises `ConfigError` for one that is not square, before it is decoded."""
    height, width = image_size(image, where=where)
    if width != height:
        raise ConfigError(f"edit: {where} is {width} × {height}, and this model draws squares; cut it to one first")
    picture = load_image(image, where=where).convert("RGB")
    return torch.from_numpy(np.asarray(picture.resize((side, side))).copy()).permute(2, 0, 1)[None]


def _shrunk(mask: Tensor, side: int) -> Tensor:
    """A mask ``(height, width)`` at the size that the model draws."""
    return F.interpolate(mask[None, None].float(), (side, side), mode="nearest")[0, 0].bool()
