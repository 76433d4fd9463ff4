"""How is a map divided into n × n parts, in tiles or in strides, and put together again (INF-LLaVA, arXiv 2407.16198)?"""

from __future__ import annotations

from torch import Tensor


def crop_parts(maps: Tensor, n: int) -> Tensor:
    """``(B, C, H, W)`` → ``(B, n², C, H/n, W/n)``: its n × n tiles, in rows."""
    parts = maps.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # B, C, n, h, n, w
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join_crops(parts: Tensor, n: int) -> Tensor:
    """The inverse of `crop_parts`."""
    return parts.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def strided_parts(maps: Tensor, n: int) -> Tensor:
    """``(B, C, H, W)`` → ``(B, n², C, H/n, W/n)``: part ``n · row + column`` has every n-th place from (row, column)."""
    parts = maps.unflatten(3, (-1, n)).unflatten(2, (-1, n))  # B, C, h, n, w, n
    return parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)


def join_strided(parts: Tensor, n: int) -> Tensor:
    """The inverse of `strided_parts`."""
    return parts.unflatten(1, (n, n)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
