"""What does the trainer see of a diffusion decoder: its parts by name, and a loss for a batch of pictures?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mllm.train.engine.trainable import StageConfig, StageModel
from mllm.train.stages.tokenizer.pictures import PIXELS
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from mllm.visual_tokenizers.diffusion.edit import kept_maps, random_masks
from mllm.visual_tokenizers.images import augment, to_pixels
from mllm.visual_tokenizers.recipe import DiffusionTraining

PART = "diffusion_decoder"


class DiffusionModel(StageModel):
    """A diffusion decoder beside its frozen tokenizer, as the trainer wants a model. Parts: ``diffusion_decoder.network``,
    ``diffusion_decoder.sequence`` where the network attends to the codes, and ``diffusion_decoder.branches.NAME``."""

    def __init__(self, decoder: DiffusionDecoder, training: DiffusionTraining):
        super().__init__()
        self.decoder, self.tokenizer, self.training_spec = decoder, decoder.tokenizer.requires_grad_(False), training
        self.autocast = training.stage.dtype == "bfloat16"
        self.named: dict[str, Tensor] = {}
        """Losses of the last micro-batch, on the device."""
        self.config = StageConfig(PART)

    def train(self, mode: bool = True) -> DiffusionModel:
        """The tokenizer stays as it is: codebooks that follow a moving average would go on moving."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def part_prefixes(self) -> dict[str, list[str]]:
        names = ["network"] if self.decoder.sequence is None else ["network", "sequence"]
        names += [f"branches.{name}" for name in self.decoder.branches]
        return {f"{PART}.{name}": [f"decoder.{name}."] for name in names}

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        return {
            part: [(prefixes[0].rstrip("."), self.get_submodule(prefixes[0].rstrip(".")))]
            for part, prefixes in self.part_prefixes().items()
        }

    def part_of(self, parameter_name: str) -> str:
        """``frozen`` for the tokenizer and the autoencoder of the latents."""
        for part, prefixes in self.part_prefixes().items():
            if parameter_name.startswith(tuple(prefixes)):
                return part
        return "frozen"

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        beside = [network for branch in self.decoder.branches.values() for network in branch.networks()]  # type: ignore[operator]
        for network in (self.decoder.network, *beside):
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    @torch.no_grad()
    def seen(self, pixels: Tensor) -> dict[str, Any]:
        """What the decoder's loss takes beside the pictures ``(B, 3, H, W)``."""
        small = self.decoder.shrunk(pixels)
        vectors, reconstruction = self._told_by_codes(small)
        masks, kept, heat = self.training_spec.options.masks, None, None
        if masks is not None:
            chosen = random_masks(masks, len(pixels), pixels.shape[-1]).to(pixels.device)
            kept = kept_maps(self.decoder, pixels, chosen)
            if masks.emphasis:
                hidden = kept[:, 0]
                heat = hidden * (1 - hidden.mean((1, 2), keepdim=True))
        return {"vectors": vectors, "reconstruction": reconstruction, "kept": kept, "heat": heat}

    def _told_by_codes(self, small: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Code vectors, and the tokenizer's own picture where that is a condition."""
        if small.is_meta:  # a plan: codes cannot be looked at, and only shapes count
            dims, grids = self.tokenizer.embed_dims, self.tokenizer.grids
            return {n: small.new_zeros(len(small), grids[n][0] * grids[n][1], dim) for n, dim in dims.items()}, small
        codes = self.tokenizer.encode(small)
        wanted = "reconstruction" in self.decoder.config.conditions
        return self.tokenizer.embed(codes), self.tokenizer.decode(codes) if wanted else None

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over this batch's pictures, weighted by their share of ``num_items_in_batch``, the pictures of the
        optimizer step on all processes. inputs: ``pixel_values`` ``(B, 3, S, S)`` uint8."""
        pixels = augment(to_pixels(inputs[PIXELS], inputs[PIXELS].device), self.training_spec.images)
        kind = "cpu" if pixels.is_meta else pixels.device.type  # a plan runs it on meta
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.decoder.loss(pixels, **self.seen(pixels)).mean()
        self.named = {self.decoder.config.objective: loss.detach()}
        return SimpleNamespace(loss=loss * (len(pixels) / float(num_items_in_batch)))
