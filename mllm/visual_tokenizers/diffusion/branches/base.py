"""What is a conditioning branch: what is it built beside, what does it see, what does it give?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.branches import CONDITIONING_BRANCHES
from mllm.visual_tokenizers.diffusion.branches.injection import Residuals


class BranchConfig(StrictModel):
    """What every branch's config has."""

    type: str
    sees: list[str] = Field(default=["source"], min_length=1)
    """Conditions that the branch sees in the network's place: channels, reconstruction or source; or a codebook by its name, whose map
    the network sees with the others where it has the condition channels."""
    scale: float = 1.0
    """Of all that it adds."""


@dataclass(frozen=True)
class Trunk:
    """What a branch is built beside.

    network: the denoiser, of `diffusers`. build: input channels and a number of blocks (None: as many as it has) → another network of its
    class. channels: of the denoiser's input. text_width: of the sequence of codes, None without one.
    """

    network: nn.Module
    build: Callable[[int, int | None], nn.Module]
    channels: int
    text_width: int | None = None


@dataclass(frozen=True)
class Seen:
    """What a branch is told at every step.

    inputs: what the network itself is given ``(B, C, H, W)``. maps: the conditions that the branch sees, in their order ``(B, M, H, W)``.
    hidden: ``(B, 1, H, W)``, above 0 where a picture is made anew; None where nothing is edited. tokens: the sequence of codes
    ``(B, N, D)``. call: a network, its input and further arguments → its output, at this step's time.
    """

    inputs: Tensor
    maps: Tensor
    hidden: Tensor | None
    tokens: Tensor | None
    call: Callable[..., Any]


class ConditioningBranch(nn.Module):
    """Adds to what the network's places tell: the blocks of a transformer, or a U-Net's skips and its middle.

    ``__init__`` builds on the meta device. A branch changes nothing before it is trained. Its parameters share no memory with the trunk's.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[BranchConfig]] = BranchConfig
    config: BranchConfig

    def __init__(self, config: BranchConfig, trunk: Trunk, channels: int):
        """channels: of ``Seen.maps``. Raises `ConfigError` for a trunk that it cannot stand beside."""
        super().__init__()
        self.config = config

    def forward(self, seen: Seen) -> Residuals:
        """What is added at each place; None: nothing."""
        raise NotImplementedError

    def start_from(self, trunk: Trunk) -> None:
        """Take the trunk's weights, as copies, where the branch has the same. Called once it is built and when published weights come."""

    def networks(self) -> list[nn.Module]:
        """Networks of `diffusers` inside it, for gradient checkpointing."""
        return []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A decoder's config with a tiny branch of this kind, for the contract's checks (beside a tokenizer of 16-pixel pictures)."""
        raise NotImplementedError


def branch_config(value: Any, where: str) -> BranchConfig:
    """The strict config that a mapping with ``type`` means. Raises `ConfigError` with the path to the key."""
    if isinstance(value, BranchConfig):
        return value
    if not isinstance(value, Mapping) or "type" not in value:
        raise ConfigError(f"{where}: expected a mapping with type, one of {', '.join(CONDITIONING_BRANCHES)}")
    return validate(CONDITIONING_BRANCHES.get(value["type"]).Config, value, where=where)


def build_branch(config: BranchConfig, trunk: Trunk, channels: int, where: str) -> ConditioningBranch:
    """The branch, on the trunk's weights. Raises `ConfigError` that starts with ``where``."""
    try:
        branch = CONDITIONING_BRANCHES.get(config.type)(config, trunk, channels)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    branch.start_from(trunk)
    return branch


def blocks_of(depth: int | None, blocks: int) -> int:
    """How many blocks a branch has beside a network of so many. Raises `ConfigError` for more."""
    if depth is not None and depth > blocks:
        raise ConfigError(f"depth: {depth} blocks beside a network of {blocks}; give at most as many")
    return depth or blocks


def silent(width: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def take_weights(own: nn.Module, given: nn.Module, channels: int) -> None:
    """Copy what has the same name and shape; of the first convolution where ``own`` sees more, the first ``channels`` input channels, and
    zeros for all that only it sees."""
    known = given.state_dict()
    for name, value in own.state_dict().items():
        if name in known and known[name].shape == value.shape:
            value.copy_(known[name])
        elif name in known and name.endswith(("proj.weight", "conv_in.weight")) and value.dim() == 4:
            value.zero_()
            value[:, :channels].copy_(known[name][:, :channels])
