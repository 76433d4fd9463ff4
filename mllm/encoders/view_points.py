"""Where in space do encoders of several views say that each pixel lies? VGGT's point head; Depth Anything 3's depth and cameras."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.encoders.depth_anything_3 import DepthAnything3Encoder
from mllm.encoders.dpt import DptHead
from mllm.encoders.multiview import ViewsEncoder
from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.weights import load_exactly
from mllm.errors import ConfigError

_DA3_HEADS = {384: (64, (48, 96, 192, 384)), 768: (128, (96, 192, 384, 768)), 1024: (256, (256, 512, 1024, 1024))}
"""Depth Anything 3's head by the backbone's width: what is fused into, and the maps."""


class PointReader:
    """An encoder of several views with what tells from its features where each pixel lies. The head computes in float32 behind an
    encoder of any dtype.

    Args:
        encoder: resolved for the size of the views, with ``layers`` the four that its head reads (`layers_read`).

    Raises:
        ConfigError: its layers are not four, or there is no such head for it.
    """

    upstream: ClassVar[str] = ""
    """What the published checkpoint calls the head."""
    head: nn.Module

    def __init__(self, encoder: ViewsEncoder):
        if len(encoder.config.layers) != 4:
            raise ConfigError(f"layers: the head reads four layers; the encoder gives {encoder.config.layers}")
        self.encoder = encoder

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        """Layers of the published model's encoder that the head reads, counted from 1."""
        raise NotImplementedError

    def load(self) -> None:
        """Read encoder and head from ``config.weights``. Raises `CheckpointError`, `UnavailableError`."""
        names = set(self.head.state_dict())
        with self.encoder.read_once():
            self.encoder.load_pretrained()
            source, state = self.encoder.published({f"{self.upstream}{key}" for key in names})
        own = {key.removeprefix(self.upstream): value for key, value in state.items() if key.startswith(self.upstream)}
        load_exactly(self.head, {key: own[key] for key in names & set(own)}, source=f"{source} (its {self.upstream}…)")

    @torch.no_grad()
    def read(self, pixels: Tensor, *, at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Points and confidence of the views of one scene.

        Args:
            pixels: ``(S, 3, H, W)``, normalised as the encoder's ``info.image`` says.
            at_once: views that the head takes at a time.

        Returns:
            Points ``(S, H, W, 3)``, as the first view's camera has them, and confidence ``(S, H, W)``, at least 1, float32 on the CPU.
            Their unit is the scene's own.
        """
        raise NotImplementedError

    def _told(self, head: DptHead, pixels: Tensor, at_once: int) -> tuple[Tensor, Tensor | None]:
        """What the head says of every pixel ``(S, H, W, …)``, and the encoder's prefix ``(S, P, 4 D)``."""
        features = self.encoder(pixels, scene_ids=torch.zeros(len(pixels), dtype=torch.long, device=pixels.device))
        layers = features.tokens.float().chunk(4, dim=-1)
        parts = [
            head([layer[begin : begin + at_once] for layer in layers], features.grid)
            for begin in range(0, len(pixels), at_once)
        ]
        return torch.cat(parts), features.prefix


class VggtPoints(PointReader):
    """VGGT's point head, whose points are the reference view's, which is the first."""

    upstream: ClassVar[str] = "point_head."

    def __init__(self, encoder: VggtEncoder):
        super().__init__(encoder)
        self.head = DptHead(
            2 * encoder.config.width,
            patch_size=encoder.config.patch_size,
            channels=(256, 512, 1024, 1024),
            fused=256,
            outputs=4,
            clipped=True,
        )

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        return [5, 12, 18, 24]

    @torch.no_grad()
    def read(self, pixels: Tensor, *, at_once: int = 8) -> tuple[Tensor, Tensor]:
        told, _ = self._told(self.head, pixels, at_once)  # type: ignore[arg-type]
        points, confidence = vggt_points(told)
        return points.cpu(), confidence.cpu()


def vggt_points(told: Tensor) -> tuple[Tensor, Tensor]:
    """What VGGT's head says ``(…, 4)`` → points ``(…, 3)``, confidence ``(…)``."""
    places, confidence = told[..., :3], told[..., 3]
    return places.sign() * places.abs().expm1(), 1 + confidence.exp()


class CameraDecoder(nn.Module):
    """Depth Anything 3's: camera tokens ``(S, D)`` → poses ``(S, 9)``: where the camera is, its rotation (quaternion x, y, z, w; camera →
    world), and its vertical and horizontal field of view in radians."""

    def __init__(self, width: int):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t, self.fc_qvec = nn.Linear(width, 3), nn.Linear(width, 4)
        self.fc_fov = nn.Sequential(nn.Linear(width, 2), nn.ReLU())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.backbone(tokens)
        return torch.cat([self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)], dim=-1)


class DepthAnything3Points(PointReader):
    """Depth Anything 3's depth, laid into space by the cameras that it tells."""

    def __init__(self, encoder: DepthAnything3Encoder):
        super().__init__(encoder)
        config = encoder.config
        if config.across_from is None or not config.keep_prefix:
            raise ConfigError(
                "encoder: points need the cameras, which the models of single pictures do not tell (across_from: null); keep_prefix: true "
                "gives their tokens"
            )
        fused, channels = _DA3_HEADS.get(config.width, _DA3_HEADS[768])
        head = DptHead(
            2 * config.width, patch_size=config.patch_size, channels=channels, fused=fused, outputs=2, clipped=False
        )
        self.head = nn.ModuleDict({"head": head, "cam_dec": CameraDecoder(2 * config.width)})

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        return [12, 16, 20, 24] if depth > 12 else [6, 8, 10, 12]

    @torch.no_grad()
    def read(self, pixels: Tensor, *, at_once: int = 8) -> tuple[Tensor, Tensor]:
        told, prefix = self._told(self.head["head"], pixels, at_once)  # type: ignore[index]
        assert prefix is not None
        poses = self.head["cam_dec"](prefix[:, 0].float().chunk(4, dim=-1)[-1])  # type: ignore[index]
        return laid_by_cameras(told[..., 0].exp(), poses).cpu(), 1 + told[..., 1].exp().cpu()


def laid_by_cameras(depth: Tensor, poses: Tensor) -> Tensor:
    """Depth ``(S, H, W)`` along the cameras' axes, laid into space by their poses ``(S, 9)`` (`CameraDecoder`) → ``(S, H, W, 3)`` as the
    first view's camera has it: x right, y down, z forward. Rays go through the pixels' centres."""
    rows, cols = depth.shape[1:]
    down = ((torch.arange(rows, device=depth.device) + 0.5) / rows * 2 - 1)[None, :, None]
    across = ((torch.arange(cols, device=depth.device) + 0.5) / cols * 2 - 1)[None, None]
    high, wide = (poses[:, 7:] / 2).tan().clamp(min=1e-6).unbind(dim=-1)
    seen = torch.stack([across * wide[:, None, None] * depth, down * high[:, None, None] * depth, depth], dim=-1)
    turns, places = rotations(poses[:, 3:7]), poses[:, :3]
    world = torch.einsum("srcj,sij->srci", seen, turns) + places[:, None, None]
    return (world - places[0]) @ turns[0]


def rotations(quaternions: Tensor) -> Tensor:
    """Quaternions ``(S, 4)`` (x, y, z, w, of any length) → matrices ``(S, 3, 3)``."""
    x, y, z, w = nn.functional.normalize(quaternions, dim=-1).unbind(dim=-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


READERS: dict[str, Any] = {"vggt": VggtPoints, "depth_anything_3": DepthAnything3Points}
"""Encoder type → its `PointReader`."""
