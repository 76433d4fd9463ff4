"""Where in space do encoders of several views say that each pixel lies? The heads of VGGT, Depth Anything 3, π³ and MapAnything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.encoders.camera_rays import Cameras, cameras_of_rays, pixel_places
from mllm.encoders.depth_anything_3 import DepthAnything3Encoder
from mllm.encoders.dpt import DptHead, DualDptHead
from mllm.encoders.library import take_layers
from mllm.encoders.mapanything import HEADS, MapAnythingEncoder
from mllm.encoders.mapanything_heads import MapAnythingHeads
from mllm.encoders.multiview import ViewsEncoder
from mllm.encoders.pi3 import Pi3Encoder
from mllm.encoders.pi3_heads import Pi3Heads
from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.view_blocks import rotary_table, token_places
from mllm.encoders.weights import load_exactly
from mllm.errors import ConfigError
from mllm.types import Grid

_LARGE = (256, (256, 512, 1024, 1024))
_DA3_HEADS = {384: (64, (48, 96, 192, 384)), 768: (128, (96, 192, 384, 768)), 1024: _LARGE, 1536: _LARGE}
"""Depth Anything 3's head by the backbone's width: what is fused into, and the maps."""
_MAPANYTHING = (256, (96, 192, 384, 768))
"""MapAnything's dense head: likewise."""


@dataclass(frozen=True)
class SeenViews:
    """What is told of S views: points ``(S, H, W, 3)`` before each one's own camera (x right, y down, z forward; NaN: no place), confidence
    ``(S, H, W)``, and of the cameras turns ``(S, 3, 3)`` (camera → world) and places ``(S, 3)``."""

    own: Tensor
    confidence: Tensor
    turns: Tensor
    places: Tensor

    @property
    def points(self) -> Tensor:
        """``(S, H, W, 3)`` as the first view's camera has them, float32 on the CPU."""
        return seen_by_first(self.own, self.turns, self.places).float().cpu()

    @property
    def cameras(self) -> Tensor:
        """``(S, 3, 4)``: each camera's coordinates → the first one's, float32 on the CPU."""
        turns, places = self.turns[0].T @ self.turns, (self.places - self.places[0]) @ self.turns[0]
        return torch.cat([turns, places[..., None]], dim=-1).float().cpu()

    @property
    def depth(self) -> Tensor:
        """``(S, H, W)`` along each camera's axis, float32 on the CPU."""
        return self.own[..., 2].float().cpu()

    @property
    def field_of_view(self) -> tuple[float, float]:
        """(vertical, horizontal) degrees that most points say, the axis through the middle of the picture."""
        _, rows, columns, _ = self.own.shape
        across, down, _ = pixel_places(rows, columns, self.own.device).unbind(-1)
        found = []
        for place, channel in ((down, 1), (across, 0)):
            told = (self.own[..., channel] / self.own[..., 2] / place)[
                :, place.abs() > 0.25
            ]  # near the axis it says little
            told = told[told.isfinite() & (told > 0)]
            found.append(float(told.median().atan().mul(2).rad2deg()) if len(told) else float("nan"))
        return found[0], found[1]


class PointReader:
    """An encoder of several views with what tells from its features where each pixel lies. The head computes in float32 behind an
    encoder of any dtype.

    Args:
        encoder: resolved for the size of the views, with ``layers`` the four that its head reads (`layers_read`).

    Raises:
        ConfigError: its layers are not four, or there is no such head for it.
    """

    parts: ClassVar[dict[str, str]] = {}
    """What the published checkpoint calls the parts of the head, and where they are in `head` (``""``: it is the head)."""
    num_layers: ClassVar[int] = 4
    head: nn.Module

    def __init__(self, encoder: ViewsEncoder):
        if len(encoder.config.layers) != self.num_layers:
            named = "four layers" if self.num_layers == 4 else "one layer"
            raise ConfigError(f"layers: the head reads {named}; the encoder gives {encoder.config.layers}")
        self.encoder = encoder

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        """Layers of the published model's encoder that the head reads, counted from 1."""
        raise NotImplementedError

    def load(self) -> None:
        """Read encoder and head from ``config.weights``. Raises `CheckpointError`, `UnavailableError`."""
        parts = {name: self.head.get_submodule(own) for name, own in self.parts.items()}
        names = {f"{name}.{key}" for name, part in parts.items() for key in part.state_dict()}
        with self.encoder.read_once():
            self.encoder.load_pretrained()
            source, state = self.encoder.published(names)
        for name, part in parts.items():
            told = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            told, known = self.as_built(name, told)
            load_exactly(part, told, source=f"{source} (its {name}…)", known=known, heads=())

    def as_built(self, part: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """A part's published tensors by the names that ours has, and which of them ours does without."""
        return state, set()

    def see(self, pixels: Tensor, *, at_once: int = 8) -> SeenViews:
        """What is told of the views of one scene, cameras and depth among it.

        Args:
            pixels: ``(S, 3, H, W)``, normalised as the encoder's ``info.image`` says.
            at_once: views that the head takes at a time.

        Returns:
            Points before each view's camera, confidence and cameras.

        Raises:
            ConfigError: the head tells points alone.
        """
        raise ConfigError(
            f"encoder: the head of type {self.encoder.config.type} that is here tells points alone, no cameras and no depth; take "
            "da3-base, pi3 or mapanything-apache"
        )

    @torch.no_grad()
    def read(self, pixels: Tensor, *, at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Points and confidence of the views of one scene.

        Args:
            pixels: ``(S, 3, H, W)``, normalised as the encoder's ``info.image`` says.
            at_once: views that the head takes at a time.

        Returns:
            Points ``(S, H, W, 3)``, as the first view's camera has them, and confidence ``(S, H, W)``, the higher the surer, float32 on the
            CPU. Their unit is the scene's own (MapAnything's: a metre); NaN where the model says that a pixel shows no place.
        """
        seen = self.see(pixels, at_once=at_once)
        return seen.points, seen.confidence.cpu()

    def _layers(self, pixels: Tensor) -> tuple[list[Tensor], Tensor, Grid]:
        """What the head reads of each layer ``(S, N, D)``, the last layer's prefix ``(S, P, D)``, and the grid."""
        features = self.encoder(pixels, scene_ids=torch.zeros(len(pixels), dtype=torch.long, device=pixels.device))
        assert features.prefix is not None
        widths = self.widths(features.tokens.shape[-1])
        prefix = features.prefix.float().split(widths, dim=-1)[-1]
        return list(features.tokens.float().split(widths, dim=-1)), prefix, features.grid

    def widths(self, total: int) -> list[int]:
        """Channels of each layer, of ``total``."""
        return [total // self.num_layers] * self.num_layers


def _by_parts(read: Callable[..., tuple[Tensor, ...]], at_once: int, *inputs: Tensor) -> list[Tensor]:
    """What ``read`` makes of so many views at a time."""
    parts = zip(*(one.split(at_once) for one in inputs), strict=True)
    return [torch.cat(found) for found in zip(*(read(*some) for some in parts), strict=True)]


class VggtPoints(PointReader):
    """VGGT's point head, whose points are the reference view's, which is the first."""

    parts: ClassVar[dict[str, str]] = {"point_head": ""}
    head: DptHead

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
        layers, _, grid = self._layers(pixels)
        points, confidence = _by_parts(lambda *some: vggt_points(self.head(some, grid)), at_once, *layers)
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
    """Depth Anything 3's depth, laid into space by the cameras that it tells.

    Args:
        encoder: of the models of several views.
        by_rays: cameras are those that fit its map of rays (`cameras_of_rays`) in place of what its camera decoder says.
    """

    parts: ClassVar[dict[str, str]] = {"head": "head", "cam_dec": "cam_dec"}

    def __init__(self, encoder: DepthAnything3Encoder, *, by_rays: bool = False):
        super().__init__(encoder)
        config = encoder.config
        if config.across_from is None or not config.keep_prefix:
            raise ConfigError(
                "encoder: points need the cameras, which the models of single pictures do not tell (across_from: null); keep_prefix: true "
                "gives their tokens"
            )
        fused, channels = _DA3_HEADS.get(config.width, _DA3_HEADS[768])
        head = DualDptHead(2 * config.width, patch_size=config.patch_size, channels=channels, fused=fused)
        self.by_rays = by_rays
        self.head = nn.ModuleDict({"head": head, "cam_dec": CameraDecoder(2 * config.width)})

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        return {12: [6, 8, 10, 12], 40: [20, 28, 34, 40]}.get(depth, [12, 16, 20, 24])

    def as_built(self, part: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """The four outputs of rays share a norm, of whose names a file of safetensors keeps the first alone."""
        own = set(self.head.get_submodule(self.parts[part]).state_dict())
        coarser = {
            key: [key.replace("_aux.3.", f"_aux.{level}.") for level in range(3)] for key in own if "_aux.3." in key
        }
        shared = {key: names[0] for key, names in coarser.items() if "output_conv2_aux.3.2." in key}
        told = state | {key: state[name] for key, name in shared.items() if key not in state and name in state}
        return told, {name for names in coarser.values() for name in names}

    @torch.no_grad()
    def see(self, pixels: Tensor, *, at_once: int = 8) -> SeenViews:
        layers, camera, grid = self._layers(pixels)
        head: Any = self.head["head"]  # type: ignore[index]
        if self.by_rays:
            told, rays = _by_parts(lambda *some: head.both(some, grid), at_once, *layers)
            cameras = cameras_of_rays(rays[..., :6], 1 + rays[..., 6].exp())
        else:
            (told,) = _by_parts(lambda *some: (head(some, grid),), at_once, *layers)
            cameras = cameras_of_poses(self.head["cam_dec"](camera[:, 0]))  # type: ignore[index]
        return SeenViews(
            before_cameras(told[..., 0].exp(), cameras), 1 + told[..., 1].exp(), cameras.turns, cameras.places
        )


def cameras_of_poses(poses: Tensor) -> Cameras:
    """What poses ``(S, 9)`` (`CameraDecoder`) say of cameras, whose axes go through the middle of their pictures."""
    high, wide = (poses[:, 7:] / 2).tan().clamp(min=1e-6).unbind(dim=-1)
    return Cameras(
        rotations(poses[:, 3:7]), poses[:, :3], torch.stack([wide, high, torch.ones_like(wide)], -1).diag_embed()
    )


def before_cameras(depth: Tensor, cameras: Cameras) -> Tensor:
    """Depth ``(S, H, W)`` along the cameras' axes → the points ``(S, H, W, 3)`` that each has before it: x right, y down, z forward. Rays
    go through the pixels' centres."""
    _, rows, columns = depth.shape
    return torch.einsum("rcj,sij,src->srci", pixel_places(rows, columns, depth.device), cameras.lens.to(depth), depth)


def seen_by_first(points: Tensor, turns: Tensor, places: Tensor) -> Tensor:
    """Points ``(S, H, W, 3)`` that each view's camera sees before it, as the first one has them. turns ``(S, 3, 3)``, places ``(S, 3)``:
    of the cameras."""
    own = turns[0].T @ turns  # in the cameras' own precision
    moved = (places - places[0]) @ turns[0]
    return torch.einsum("srcj,sij->srci", points, own.to(points)) + moved.to(points)[:, None, None]


def rotations(quaternions: Tensor) -> Tensor:
    """Quaternions ``(S, 4)`` (x, y, z, w, of any length) → matrices ``(S, 3, 3)``."""
    x, y, z, w = nn.functional.normalize(quaternions, dim=-1).unbind(dim=-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


class Pi3Points(PointReader):
    """π³'s points before each camera, laid into space by the cameras that it tells; confidence from 0 to 1. The encoder gives its last
    layer alone."""

    names: ClassVar[tuple[str, ...]] = (
        "point_decoder", "point_head", "conf_decoder", "conf_head", "camera_decoder", "camera_head",
    )  # fmt: skip
    parts: ClassVar[dict[str, str]] = {name: name for name in names}
    num_layers: ClassVar[int] = 1
    head: Pi3Heads

    def __init__(self, encoder: Pi3Encoder):
        super().__init__(encoder)
        config = encoder.config
        if not config.keep_prefix:
            raise ConfigError("encoder: the heads read its register tokens too; keep_prefix: true gives them")
        self.head = Pi3Heads(2 * config.width, config.patch_size, inner=config.width, num_heads=config.num_heads)

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        return [depth]

    @torch.no_grad()
    def see(self, pixels: Tensor, *, at_once: int = 8) -> SeenViews:
        points, confidence, places, turns = self.told(pixels, at_once=at_once)
        return SeenViews(points, confidence.sigmoid(), turns, places)

    def told(self, pixels: Tensor, *, at_once: int = 8) -> list[Tensor]:
        """What `Pi3Heads` tell of views ``(S, 3, H, W)``."""
        (tokens,), prefix, grid = self._layers(pixels)
        special = prefix.shape[1]
        rotation = rotary_table(token_places(grid, special, tokens.device), self.head.head_dim, tokens.dtype)
        return _by_parts(
            lambda some: self.head(some, special, grid[0], rotation), at_once, torch.cat([prefix, tokens], dim=1)
        )


class MapAnythingPoints(PointReader):
    """MapAnything's rays, as long as it says, laid into space by the cameras that it tells, in metres. What it takes for no place (sky)
    is NaN; points at depth's edges, which the authors' `infer` takes away afterwards, are kept."""

    parts: ClassVar[dict[str, str]] = {name.rstrip("."): name.rstrip(".") for name in HEADS}
    head: MapAnythingHeads

    def __init__(self, encoder: MapAnythingEncoder):
        super().__init__(encoder)
        config = encoder.config
        if not config.keep_prefix:
            raise ConfigError("encoder: the scale's head reads the scale token; keep_prefix: true gives it")
        self._widths = [
            config.width if count else config.dinov2_width for count in take_layers(config.layers, config.depth)
        ]
        fused, channels = _MAPANYTHING
        self.head = MapAnythingHeads(self._widths, config.patch_size, channels=channels, fused=fused)

    @staticmethod
    def layers_read(depth: int) -> list[int]:
        return [0, depth // 2, depth * 3 // 4, depth]

    def widths(self, total: int) -> list[int]:
        return self._widths

    def as_built(self, part: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """The camera's linear layers are published as convolutions of one pixel. The dense head's convolutions have several names, of which
        a file of safetensors keeps the first alone."""
        if part == "pose_head":
            state = {key: value.flatten(1) if value.ndim == 4 else value for key, value in state.items()}
        names = [
            name for k in range(4) for name in (f"0.scratch.layer{k + 1}_rn.weight", f"0.scratch.layer_rn.{k}.weight")
        ]
        return state, set(names) if part == "dense_head" else set()

    @torch.no_grad()
    def see(self, pixels: Tensor, *, at_once: int = 8) -> SeenViews:
        rays, depth, confidence, mask, places, quaternions, scale = self.told(pixels, at_once=at_once)
        points = rays * (depth * scale[:, None, None])[..., None]
        points = points.masked_fill(mask[..., None] <= 0, torch.nan)
        return SeenViews(points, confidence, rotations(quaternions), places * scale[:, None])

    def told(self, pixels: Tensor, *, at_once: int = 8) -> list[Tensor]:
        """What `MapAnythingHeads` tell of views ``(S, 3, H, W)``."""
        layers, prefix, grid = self._layers(pixels)
        return _by_parts(lambda *some: self.head(some[:4], some[4], grid), at_once, *layers, prefix[:, 0])


READERS: dict[str, Any] = {
    "vggt": VggtPoints, "depth_anything_3": DepthAnything3Points, "pi3": Pi3Points, "mapanything": MapAnythingPoints,
}  # fmt: skip
"""Encoder type → its `PointReader`."""
