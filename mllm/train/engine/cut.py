"""How does ZeRO-3 come to hold its share of a language model that no single GPU has room for?

Every weight of the decoder is cut as soon as it is there, and the rest of it let go: what is read comes page by page from mapped files,
and a process touches the pages of its share only; what is initialised is made whole on every process from the same seed, a few weights at
a time, so values are those of a model built in one piece. Embeddings, encoders and all other parts stay whole until the engine starts,
which cuts them too.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mllm.connectors.build import connector_config
from mllm.models.making import made_by
from mllm.recipe import ModelSpec, StageSpec
from mllm.train.engine.base import choose_engine
from mllm.train.engine.shares import whole
from mllm.train.engine.zero import deepspeed_config, import_deepspeed, lent_local_rank
from mllm.train.prepare import DTYPES

LATEST = 16
"""Weights that stay whole while later ones are made: a module's constructor writes to its weights after it has registered them."""
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def can_be_cut(model: ModelSpec, stage: StageSpec, *, published: bool) -> bool:
    """Whether a stage starts from a language model in shares. Not where parts copy its weights while the model is built (they are whole
    then, as they are under every other engine), nor where an adapter begins from the norms of its weights (DoRA), nor where shares go to
    NVMe, which the engine brings there.

    Args:
        model: the recipe's model.
        stage: the stage that starts.
        published: it starts from the recipe's published weights, not from an earlier stage's.
    """
    choice = choose_engine(stage)
    if choice.zero_stage != 3 or any(
        part.lora is not None and part.lora.use_dora for part in stage.learning().values()
    ):
        return False
    if choice.offloaded("param") == "nvme" or model.language_model is None or model.language_model.modality_switch:
        return False
    return not (published and model.connector and getattr(connector_config(model.connector), "fast", None) is not None)


@contextmanager
def language_model_in_shares(stage: StageSpec, device: torch.device) -> Iterator[None]:
    """Decoders that are built or read inside are cut: this process keeps its share of each weight, on ``device``."""
    shares = _Shares(stage, device)
    with shares.watching(), made_by(shares):
        yield


@contextmanager
def language_model_on_host() -> Iterator[None]:
    """Published language models that are read inside stay on the CPU: pages of mapped files, that all processes of a machine have in
    common."""
    with made_by(_OnHost()):
        yield


class _OnHost:
    """A `Maker` that lets what is read lie where it is."""

    def building(self, vocabulary: int) -> AbstractContextManager[None]:
        return nullcontext()

    def built(self, decoder: nn.Module) -> None:
        pass

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Shares:
    """A `Maker` that cuts."""

    def __init__(self, stage: StageSpec, device: torch.device):
        deepspeed = import_deepspeed()
        choice = choose_engine(stage)
        with lent_local_rank():
            self._zero: Any = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(stage, choice, device))
        if self._zero.mem_efficient_linear:  # as DeepSpeed does for a model that it cuts itself
            self._zero._enable_mem_efficient_linear()
        self._device, self._dtype = device, DTYPES[stage.dtype]
        self._vocabulary = 0
        self._inside: set[int] = set()
        self._everything = self._building = False
        self._latest: deque[tuple[nn.Module, str, nn.Parameter]] = deque()

    @contextmanager
    def building(self, vocabulary: int) -> Iterator[None]:
        self._vocabulary = vocabulary
        self._building = True
        try:
            yield
            self._cut_all_but(0)
        finally:
            self._building = False
            self._latest.clear()

    def built(self, decoder: nn.Module) -> None:
        self._inside |= {id(module) for module in decoder.modules()}

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._everything = True
        try:
            yield
        finally:
            self._everything = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Weights are cut as modules take them."""
        register, initialise = nn.Module.register_parameter, PreTrainedModel._initialize_weights
        shares, before = self, os.environ.get(_ONE_BY_ONE)

        def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(self, name, param)
            if param is not None and not param.is_meta and not hasattr(param, "ds_id"):
                shares._taken(self, name, param)

        def initialised(self: Any, module: nn.Module, *given: Any, **options: Any) -> Any:
            if getattr(module, "_is_hf_initialized", False):
                return None
            return shares._initialised(module, lambda: initialise(self, module, *given, **options))

        nn.Module.register_parameter = registered  # type: ignore[method-assign]
        PreTrainedModel._initialize_weights = initialised  # type: ignore[method-assign]
        os.environ[_ONE_BY_ONE] = "1"
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            PreTrainedModel._initialize_weights = initialise  # type: ignore[method-assign]
            if before is None:
                del os.environ[_ONE_BY_ONE]
            else:
                os.environ[_ONE_BY_ONE] = before

    def _taken(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if self._vocabulary in parameter.shape:  # tables are tied, compared and grown after they are read
            return
        if self._building:
            self._latest.append((module, name, parameter))
            self._cut_all_but(LATEST)
        elif self._everything or id(module) in self._inside:
            self._cut(parameter)

    def _cut_all_but(self, latest: int) -> None:
        while len(self._latest) > latest:
            module, name, parameter = self._latest.popleft()
            if module._parameters.get(name) is parameter and not hasattr(parameter, "ds_id"):
                self._cut(parameter)

    @torch.no_grad()
    def _cut(self, parameter: nn.Parameter) -> None:
        """Without a word to the other processes: each has the same whole weight before it."""
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(self._dtype)
        self._zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[operator]
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)

    def _initialised(self, module: nn.Module, initialise: Callable[[], Any]) -> Any:
        """transformers initialises a model after it is built, each module with its weights and its children's."""
        self._cut_all_but(0)
        own = (p for each in (module, *module.children()) for p in each.parameters(recurse=False))
        with whole(dict.fromkeys(p for p in own if not getattr(p, "_is_hf_initialized", False)), changed=True):
            return initialise()
