"""How does the discriminator of a tokenizer stage learn? The one step that the common engine does not do."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm import distributed
from mllm.errors import CheckpointError, ConfigError
from mllm.visual_tokenizers.networks.discriminator import build_discriminator, hinge_discriminator_loss
from mllm.visual_tokenizers.recipe import AdversarialSpec


class Adversary:
    """A discriminator with an optimizer of its own. After each update of the tokenizer it learns from the same pictures and
    the reconstructions that the tokenizer made of them before.

    lr: where the spec gives none; max_grad_norm: as the stage's optimizer has it.
    """

    def __init__(self, spec: AdversarialSpec, *, lr: float, max_grad_norm: float | None, autocast: bool):
        self.spec, self.max_grad_norm, self.autocast = spec, max_grad_norm, autocast
        self.network: nn.Module = build_discriminator(spec.discriminator)
        self.lr = spec.lr or lr
        self._seen: list[tuple[Tensor, Tensor, float]] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def start(self, device: torch.device) -> None:
        """To the device, equal on all processes."""
        self.network.to(device).train()
        distributed.broadcast_state(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.lr, betas=self.spec.betas, weight_decay=0.0
        )

    def see(self, made: Tensor, pixels: Tensor, share: float) -> None:
        """One micro-batch of this step, reconstructions and pictures ``(B, 3, H, W)``; share: of the step's pictures."""
        self._seen.append((made.detach(), pixels, share))

    def step(self) -> Tensor | None:
        """One update from what was seen; returns this process's part of the loss, None when nothing was seen."""
        if not self._seen:
            return None
        assert self.optimizer is not None
        total = None
        for made, pixels, share in self._seen:
            with torch.autocast(made.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                real, fake = self.network(pixels), self.network(made.float())
                loss = hinge_discriminator_loss(real, fake, leak=self.spec.leak) * share
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        self._seen = []
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        _sum_gradients(parameters)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"the discriminator's gradient became {float(norm)}; lower options.losses.adversarial.lr ({self.lr:g}), or use "
                "dtype: float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state by name."""
        assert self.optimizer is not None
        state = {f"discriminator.{name}": value.detach() for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}|{key}"] = value.detach()
        return {name: value.cpu().contiguous().clone() for name, value in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """What `state` gave. Raises `CheckpointError` for another network's."""
        assert self.optimizer is not None
        weights = {k.removeprefix("discriminator."): v for k, v in state.items() if k.startswith("discriminator.")}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint's discriminator is another one: {error}") from None
        parameters = dict(self.network.named_parameters())
        for key, value in state.items():
            if key.startswith("optimizer."):
                name, _, entry = key.removeprefix("optimizer.").partition("|")
                parameter = parameters[name]
                self.optimizer.state[parameter][entry] = value if value.dim() == 0 else value.to(parameter.device)


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum over processes, in one message."""
    if distributed.world_size() == 1 or not parameters:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter))
