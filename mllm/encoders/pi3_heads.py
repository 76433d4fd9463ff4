"""What do π³'s heads tell of views? Where each pixel lies before its camera, how sure that is, and where the camera stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.encoders.view_blocks import Block, Rotation

_BLOCKS = 5


class TokenDecoder(nn.Module):
    """Blocks that see one view each, between two linear layers: tokens ``(B, N, D)`` → ``(B, N, width_out)``."""

    def __init__(self, width_in: int, width: int, width_out: int, num_heads: int):
        super().__init__()
        self.projects = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qk_norm=False, scale=None, eps=1e-6) for _ in range(_BLOCKS)
        )
        self.linear_out = nn.Linear(width, width_out)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = self.projects(x)
        for block in self.blocks:
            x = block(x, rotation)
        return self.linear_out(x)


class PixelHead(nn.Module):
    """Patches ``(B, rows * columns, D)`` → values of their pixels ``(B, H, W, outputs)``, unfolded from each patch's channels."""

    def __init__(self, width: int, outputs: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(width, outputs * patch_size**2)

    def forward(self, patches: Tensor, rows: int) -> Tensor:
        maps = self.proj(patches).transpose(1, 2).unflatten(2, (rows, -1))
        return F.pixel_shuffle(maps, self.patch_size).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """Three linear layers with ReLU beside what they are given."""

    def __init__(self, width: int):
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))


class CameraHead(nn.Module):
    """Patches ``(B, N, D)`` → where the cameras stand ``(B, 3)`` and how they are turned ``(B, 3, 3)`` (camera → world)."""

    def __init__(self, width: int, *, turned: int = 9):
        super().__init__()
        self.res_conv = nn.ModuleList(Residual(width) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(width, 3), nn.Linear(width, turned)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        place, turn = self.both(patches)
        return place, nearest_rotation(turn.unflatten(1, (3, 3)))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Place ``(B, 3)`` and the numbers ``(B, turned)`` that say how the camera is turned."""
        for layer in self.res_conv:
            x = layer(x)
        x = self.more_mlps(x.mean(dim=1))
        return self.fc_t(x), self.fc_rot(x)


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to matrices ``(B, 3, 3)`` whose rows are brought to length 1 first (arXiv 2006.14616)."""
    left, _, right = torch.linalg.svd(F.normalize(matrix, dim=-1))
    sign = torch.linalg.det(left @ right)
    return torch.cat([left[:, :, :2], left[:, :, 2:] * sign[:, None, None]], dim=-1) @ right


class Pi3Heads(nn.Module):
    """All that π³ tells of a view.

    Args:
        width: channels of the tokens that it reads.
        patch_size: pixels of a patch's side.
        inner, num_heads: of the decoders, 1024 and 16 as published; the camera's gives half as many channels.
    """

    def __init__(self, width: int, patch_size: int, *, inner: int, num_heads: int):
        super().__init__()
        self.point_decoder, self.conf_decoder = (TokenDecoder(width, inner, inner, num_heads) for _ in range(2))
        self.camera_decoder = TokenDecoder(width, inner, inner // 2, num_heads)
        self.point_head, self.conf_head = PixelHead(inner, 3, patch_size), PixelHead(inner, 1, patch_size)
        self.camera_head = CameraHead(inner // 2)
        self.head_dim = inner // num_heads

    def forward(
        self, tokens: Tensor, special: int, rows: int, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of views ``(B, special + rows * columns, D)``, special ones first, and the rotation of one view's → points before the
        camera ``(B, H, W, 3)``, confidence ``(B, H, W)`` before its sigmoid, and the cameras' places ``(B, 3)`` and rotations
        ``(B, 3, 3)``."""
        points = self.point_head(self.point_decoder(tokens, rotation)[:, special:], rows)
        depth = points[..., 2:].exp()
        points = torch.cat([points[..., :2] * depth, depth], dim=-1)
        confidence = self.conf_head(self.conf_decoder(tokens, rotation)[:, special:], rows)[..., 0]
        place, turn = self.camera_head(self.camera_decoder(tokens, rotation)[:, special:])
        return points, confidence, place, turn
