"""What does an image cost an encoder, in floating-point operations?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def gflops(model: Callable[[Any], Any], size: tuple[int, ...]) -> float:
    """10⁹ multiplications and additions (each counts) of the products that ``model`` does for pixels of ``size``, counted on the
    meta device, where nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(size))
    return counter.get_total_flops() / 1e9
