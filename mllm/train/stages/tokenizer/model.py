"""What does the trainer see of a visual tokenizer: its parts by name, and a loss for a batch of pictures?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import CheckpointError, ConfigError
from mllm.models.compilation import compile_tokenizer
from mllm.train.engine.trainable import StageConfig, StageModel
from mllm.train.stages.tokenizer.adversary import Adversary
from mllm.train.stages.tokenizer.pictures import PIXELS
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.images import augment, to_pixels
from mllm.visual_tokenizers.losses import TokenizerLosses
from mllm.visual_tokenizers.recipe import TokenizerOptions, TokenizerTraining

PART = "visual_tokenizer"


class TokenizerModel(StageModel):
    """A visual tokenizer with its losses, as the trainer wants a model. Parts: ``visual_tokenizer.<child>`` of every child
    with something to learn, and ``visual_tokenizer`` for the tokenizer's own parameters."""

    def __init__(
        self, tokenizer: VisualTokenizer, training: TokenizerTraining, teacher: Any, adversary: Adversary | None
    ):
        super().__init__()
        self.tokenizer, self.training_spec = tokenizer, training
        network = None if adversary is None else adversary.network
        self.losses = TokenizerLosses(training.losses, tokenizer, teacher, network)
        self._adversary = (adversary,)  # learns by itself: no part of this module
        self.autocast = training.stage.dtype == "bfloat16"
        self.number = 0
        """Updates done; the discriminator joins in at a step of its own."""
        self.named: dict[str, Tensor] = {}
        """Losses and usage of the last micro-batch, on the device."""
        self.config = StageConfig(PART)
        freeze = tuple(training.options.freeze)
        self._learnable = {
            f"tokenizer.{name}": self._part(name)
            for name, parameter in tokenizer.named_parameters()
            if parameter.requires_grad and not (freeze and name.startswith(freeze))
        }
        _check_freeze(tokenizer, training)

    def _part(self, name: str) -> str:
        child, dot, _ = name.partition(".")
        return f"{PART}.{child}" if dot else PART

    def part_prefixes(self) -> dict[str, list[str]]:
        parts = dict.fromkeys(self._learnable.values())
        return {part: ["tokenizer." + (part.removeprefix(PART + ".") + ".") * (part != PART)] for part in parts}

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        found: dict[str, list[tuple[str, nn.Module]]] = {}
        for part in self.part_prefixes():
            path = "tokenizer" if part == PART else f"tokenizer.{part.removeprefix(PART + '.')}"
            found[part] = [(path, self.get_submodule(path))]
        return found

    def part_of(self, parameter_name: str) -> str:
        """``frozen`` for what never learns: a frozen encoder of the tokenizer's, what ``freeze`` names, teacher and
        perceptual network."""
        return self._learnable.get(parameter_name, "frozen")

    def set_modes(self) -> None:
        """Training mode for the children that learn, moving averages of codebooks included; evaluation mode elsewhere."""
        self.eval()
        self.tokenizer.training = True
        for name, child in self.tokenizer.named_children():
            held = [n for n in self._learnable if n.startswith(f"tokenizer.{name}.")]
            learns = any(self.get_parameter(n).requires_grad for n in held)
            # A child without parameters (codebooks that follow a moving average) goes with the rest.
            child.train(learns or not any(True for _ in child.parameters()))

    def compile_networks(self) -> None:
        compile_tokenizer(self.tokenizer)

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over this batch's pictures, weighted by their share of ``num_items_in_batch``, the pictures of the
        optimizer step on all processes. inputs: ``pixel_values`` ``(B, 3, S, S)`` uint8."""
        pixels = augment(to_pixels(inputs[PIXELS], inputs[PIXELS].device), self.training_spec.images)
        share = len(pixels) / float(num_items_in_batch)
        kind = "cpu" if pixels.is_meta else pixels.device.type  # a plan runs it on meta
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.autocast):
            output = self.tokenizer(pixels)
            named, total = self.losses(output, pixels, self.number)
        adversary = self._adversary[0]
        if adversary is not None and self.losses.adversarial_is_on(self.number):
            adversary.see(output.reconstruction, pixels, share)
        self.named = {key: value.detach() for key, value in {**named, **output.usage}.items()}
        return SimpleNamespace(loss=total * share)


def start_tokenizer(config: dict[str, Any], options: TokenizerOptions, init: str | None) -> VisualTokenizer:
    """Built from the config with its parts' published weights, or from the saved one in ``init``. Raises `CheckpointError`
    for weights that do not fit."""
    tokenizer = build_tokenizer(config)
    if init is None:
        tokenizer.load_pretrained()
        return tokenizer
    skipped = tuple(options.init_skip)
    source = VisualTokenizer.from_pretrained(init).state_dict()
    taken = {key: value for key, value in source.items() if not (skipped and key.startswith(skipped))}
    own = tokenizer.state_dict()
    wrong = [key for key, value in taken.items() if key not in own or own[key].shape != value.shape]
    absent = [key for key in own if key not in taken and not (skipped and key.startswith(skipped))]
    if wrong or absent:
        shown = ", ".join([*wrong, *absent][:4])
        raise CheckpointError(
            f"options.init {init}: weights do not fit ({shown} …); name what changed in options.init_skip"
        )
    tokenizer.load_state_dict(taken, strict=False)
    return tokenizer


def _check_freeze(tokenizer: VisualTokenizer, training: TokenizerTraining) -> None:
    names = [name for name, parameter in tokenizer.named_parameters() if parameter.requires_grad]
    for prefix in training.options.freeze:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"stages.{training.stage.name}.options.freeze: no trainable parameter starts with {prefix!r}. Parts: "
                + ", ".join(parts)
            )
