"""How far apart do two images look? LPIPS, on weights that the user supplies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mllm.damage import read_safetensors
from mllm.errors import CheckpointError, UnavailableError
from mllm.visual_tokenizers.recipe import PerceptualSpec

_CUTS = (4, 9, 16, 23, 30)
"""Ends of VGG-16's five slices in torchvision's ``features``."""
_WIDTHS = (64, 128, 256, 512, 512)


class PerceptualLoss(nn.Module):
    """LPIPS with VGG-16 (arXiv 1801.03924): images in [-1, 1] ``(B, 3, H, W)`` twice → mean distance.

    Features of five slices are scaled to length 1 per position; their squared differences are weighted per channel,
    averaged over positions and summed over slices.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: PerceptualSpec):
        super().__init__()
        try:
            from torchvision.models.vgg import cfgs, make_layers
        except ImportError as error:
            raise UnavailableError("losses.perceptual needs torchvision") from error
        self.features = make_layers(cfgs["D"], batch_norm=False)
        state = read_weights(spec.vgg, "losses.perceptual.vgg")
        state = {key.removeprefix("features."): value for key, value in state.items() if "classifier" not in key}
        try:
            self.features.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{spec.vgg} is not torchvision's VGG-16: {error}") from error
        weights = [torch.full((width,), 1.0 / width) for width in _WIDTHS]
        if spec.linear is not None:
            linear = read_weights(spec.linear, "losses.perceptual.linear")
            for index in range(len(_WIDTHS)):
                found = [value for key, value in linear.items() if key.startswith(f"lin{index}.")]
                if len(found) != 1 or found[0].numel() != _WIDTHS[index]:
                    raise CheckpointError(
                        f"{spec.linear}: expected one tensor lin{index}.* of {_WIDTHS[index]} weights"
                    )
                weights[index] = found[0].flatten().float()
        for index, weight in enumerate(weights):
            self.register_buffer(f"channel_weights_{index}", weight)
        # LPIPS's own input scaling: ImageNet statistics, expressed for [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def _slices(self, pixels: Tensor) -> list[Tensor]:
        x, out = (pixels - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if index + 1 in _CUTS:
                out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if index + 1 == _CUTS[-1]:
                break
        return out

    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """``(B,)``: each pair's distance."""
        total = first.new_zeros(len(first))
        for index, (a, b) in enumerate(zip(self._slices(first), self._slices(second))):
            weights = getattr(self, f"channel_weights_{index}").view(1, -1, 1, 1)
            total = total + ((a - b).square() * weights).sum(1).flatten(1).mean(1)
        return total

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.distances(first, second).mean()


def read_weights(path: str, key: str) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or ``.pth`` file that ``key`` of a recipe names. Raises `UnavailableError`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UnavailableError(
            f"{key}: {file} does not exist. Supply the weights, or leave this part of the recipe out"
        )
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    return torch.load(file, map_location="cpu", weights_only=True)
