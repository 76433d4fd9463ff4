"""How is each picture of a batch encoded with its own request's PEFT adapter?

vLLM adapts the language model. Its way for encoders counts the tokens that each layer will see of each picture, which several encoders
of different grids do not share; where the counts are wrong another request's adapter answers, without a word. Here a batch is encoded
adapter by adapter, so no count is needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import CheckpointError, UnavailableError
from mllm.models.weight_files import present_name, published_renamings
from mllm.serve.adapters import VISUAL
from mllm.types import VisualLayout

_BEFORE = "base_model.model."

_log = logging.getLogger("vllm.mllm")  # below vLLM's own logger, which has a handler


class VisualAdapters:
    """Adapters of encoders and connector by number; none is applied outside `applied`.

    parts: the modules that an adapter may change, by their names in a checkpoint below ``model.``; frozen: they run compiled or in CUDA
    graphs, which hold the layers as they were.
    """

    def __init__(self, parts: Mapping[str, nn.Module], *, frozen: bool = False):
        inner = nn.ModuleDict(dict(parts))
        self._root, self._frozen = nn.ModuleDict({"model": inner}), frozen
        self._renamings = published_renamings(inner)
        self._layers: dict[int, list[Any]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._layers

    def add(self, number: int, folder: str) -> None:
        """Read an adapter's visual weights from its ``folder``. Raises `CheckpointError` for weights that have no place here, and
        `UnavailableError` where encoders are compiled."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self._frozen:
            raise UnavailableError(
                f"{folder} changes encoders or the connector, which run compiled or in CUDA graphs here; serve without "
                "compile_mm_encoder and cudagraph_mm_encoder, or with MLLM_ENCODER_GRAPHS=0"
            )
        name, weights = str(number), self._weights(folder)
        targets = {key.partition(".lora_")[0] for key in weights}
        if absent := sorted(targets - {path for path, _ in self._root.named_modules()}):
            raise CheckpointError(f"{folder}: it changes {absent[0]}, which has no place in this model")
        config: Any = LoraConfig.from_pretrained(folder)
        config.target_modules = targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
        config.init_lora_weights = True  # others change the weights below
        with torch.inference_mode(False):  # weights that are made in it cannot be chosen among later
            vars(self._root).pop("peft_config", None)  # PEFT warns of several adapters, which are meant here
            inject_adapter_in_model(config, self._root, adapter_name=name)
            layers = [module for module in self._root.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers:
                layer.enable_adapters(False)
            own = {key for key in self._root.state_dict() if f".lora_A.{name}." in key or f".lora_B.{name}." in key}
            found = {_named(key, name): value for key, value in weights.items()}
            if wrong := sorted(own ^ found.keys()):
                raise CheckpointError(f"{folder}: {wrong[0]} is in the adapter or in the model only")
            self._root.load_state_dict(found, strict=False)
        self._layers[number] = [layer for layer in layers if name in getattr(layer, "lora_A", ())]
        self._root.requires_grad_(False)

    def remove(self, number: int) -> None:
        """Forget an adapter."""
        for layer in self._layers.pop(number, []):
            with warnings.catch_warnings():  # PEFT says that it takes another adapter; `applied` chooses each time
                warnings.simplefilter("ignore", UserWarning)
                layer.delete_adapter(str(number))

    @contextmanager
    def applied(self, number: int) -> Iterator[None]:
        """What is encoded inside is encoded with this adapter; 0: with none."""
        layers = self._layers.get(number, [])
        if number and number not in self._layers:
            _log.error("Adapter %d is not there any more; its last request was broken off", number)
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter([str(number)], inference_mode=True)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(False)

    def encode(
        self,
        encode: Callable[..., Tensor],
        numbers: Sequence[int],
        pixels: Mapping[str, Tensor],
        weights: Tensor | None,
        text: Tensor | None,
        short: Sequence[bool],
        layouts: Sequence[VisualLayout] | None,
        keys: Sequence[int] | None,
        num_tokens: int,
    ) -> Tensor:
        """``encode`` of a batch whose pictures have different adapters: ``(ΣM, L)`` in the batch's order.

        encode: takes pixels, weights, text, short, layouts and keys of some of them, and their adapter's number; num_tokens: of a
        picture without a layout of its own.
        """
        parts: dict[int, Tensor] = {}
        for number in dict.fromkeys(numbers):
            rows = [row for row, own in enumerate(numbers) if own == number]
            pick = lambda value: None if value is None else value[rows]  # noqa: B023, E731
            some = None if layouts is None else [layouts[row] for row in rows]
            with self.applied(number):
                made = encode(
                    {name: _rows_of(value, name, rows, layouts) for name, value in pixels.items()},
                    pick(weights),
                    pick(text),
                    [short[row] for row in rows] if short else [],
                    some,
                    None if keys is None else [keys[row] for row in rows],
                    number,
                )
            sizes = [num_tokens] * len(rows) if some is None else [layout.num_placeholders for layout in some]
            parts.update(zip(rows, made.split(sizes), strict=True))
        return torch.cat([parts[row] for row in range(len(numbers))])

    def _weights(self, folder: str) -> dict[str, Tensor]:
        """The adapter's visual tensors under the names of the modules here."""
        from safetensors.torch import load_file

        inside = "model."
        found: dict[str, Tensor] = {}
        for key, value in load_file(str(Path(folder) / "adapter_model.safetensors")).items():
            if any(part in key for part in VISUAL):
                name = key.removeprefix(_BEFORE).removeprefix(inside)
                found[inside + present_name(name, self._renamings)] = value
        return found


def _named(key: str, adapter: str) -> str:
    """A weight's key in an adapter's file → in a module that holds several adapters."""
    for part in (".lora_A.", ".lora_B."):
        key = key.replace(part, f"{part}{adapter}.")
    return key


def _rows_of(value: Tensor, name: str, rows: Sequence[int], layouts: Sequence[VisualLayout] | None) -> Tensor:
    """The pixels of some pictures, whose views lie one after the other where they have layouts."""
    if layouts is None:
        return value[list(rows)]
    views = value.split([layout.rows_of(name) for layout in layouts])
    return torch.cat([views[row] for row in rows])
