"""What do the model classes share? Their outputs, support flags, loading that refuses gaps, and parts by name."""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from mllm.damage import opening
from mllm.door import OpenedByDoor
from mllm.errors import CheckpointError
from mllm.heads.build import FORMER, heads_with_weights
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.foreign.checkpoint import ForeignCheckpoint
from mllm.models.foreign.read import read_foreign, recognise
from mllm.models.trained_parts import parts_folder, whole_tensors
from mllm.models.weight_files import refuse_gaps
from mllm.modes import by_umask
from mllm.noise import load_report_unless_told
from mllm.recipe import reader_of
from mllm.visual_tokenizers.diffusion.carried import attach, carry, hub_decoder


@dataclass
class MllmModelOutput(BaseModelOutputWithPast):
    """``image_hidden_states`` ``(B, M, L)``; routing: names and ``(B, E)`` weights, None without a router; features: those of the
    encoders that heads read, by name."""

    image_hidden_states: Tensor | None = None
    routing: Any = None
    features: Any = None


@dataclass
class MllmOutput(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`, with the visual tokens and the routing that were used.

    losses: ``<head>/<part>`` → loss as the head reports it, when the batch holds targets of heads.
    """

    image_hidden_states: Tensor | None = None
    routing: Any = None
    losses: dict[str, Tensor] | None = None


_FORMER_NAMES = {rf"^{FORMER}\.": f"heads.{FORMER}."}
"""Weights as checkpoints named them before heads had names."""


def _forget_former_names(model: Any) -> None:
    """transformers saves a model under the names that it was read with; former ones are not to be written again."""
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in conversions if not set(_FORMER_NAMES) & set(getattr(c, "source_patterns", ()))]
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def _attach_decoder(model: Any, path: str | Path) -> None:
    """Tell a model that draws of the diffusion decoder in its checkpoint, if there is one; nothing of it is read."""
    if getattr(model.config, "visual_tokenizer", None) is None or not hasattr(model, "image_tokenizer"):
        return
    folder = Path(path) if Path(path).is_dir() else hub_decoder(str(path))
    if folder is not None:
        attach(model.image_tokenizer, folder)


class MllmPreTrainedModel(OpenedByDoor, PreTrainedModel):
    """What both classes share: support flags, loading that refuses a checkpoint with gaps, parts by name."""

    config_class = MllmConfig
    config: MllmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    opens_foreign = False
    """Whether `from_pretrained` converts checkpoints of other formats."""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        """Components initialise themselves; here only what belongs to this class, and buffers that no file holds."""
        if hasattr(module, "restore_buffers"):
            module.restore_buffers()  # pyright: ignore[reportCallIssue]
        elif module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=getattr(self.config.get_text_config(), "initializer_range", 0.02))  # pyright: ignore[reportArgumentType]
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers, but its own models are initialised as its own inside this one too.

        It passes over a module without tensors of its own where the outermost class is not its; what such a module sets in others
        (Falcon-H1's multipliers, which no file holds) would stay as the memory was.
        """

        def visit(module: nn.Module, owner: PreTrainedModel) -> None:
            for child in module.children():
                visit(child, child if isinstance(child, PreTrainedModel) else owner)
            owner._initialize_weights(module, not type(owner).__module__.startswith("transformers.models."))

        with guard_torch_init_functions():
            visit(self, self)

    @classmethod
    @load_report_unless_told()
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint with missing or foreign weights raises `CheckpointError` instead of being filled
        with random ones, foreign checkpoints (`mllm.models.foreign.read.recognise`) are converted, and trained parts
        (`mllm.models.trained_parts`) are joined with the published weights that go with them."""
        path = pretrained_model_name_or_path
        if isinstance(path, (str, Path)) and Path(path).is_dir() and (parts := parts_folder(path)):
            return cls._from_parts(path, parts, *args, **kwargs)
        if args == () and kwargs.get("config") is None and cls.opens_foreign and isinstance(path, (str, Path)):
            kind = recognise(path)
            if kind is not None:
                model = cls.from_foreign(read_foreign(Path(path), kind, dtype=kwargs.get("dtype") or "auto"))
                device_map = kwargs.get("device_map")
                return model if device_map is None else model.to(device_map)
        wants_info = kwargs.pop("output_loading_info", False)
        if not kwargs.get("key_mapping"):
            kwargs["key_mapping"] = dict(_FORMER_NAMES)
        kwargs["ignore_mismatched_sizes"] = True  # refused below, in one line
        try:
            with opening(pretrained_model_name_or_path):
                model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
        except (FileNotFoundError, OSError) as error:
            if isinstance(path, str) and (parts := parts_folder(path, kwargs.get("revision"))):
                return cls._from_parts(path, parts, *args, output_loading_info=wants_info, **kwargs)
            raise CheckpointError(f"{pretrained_model_name_or_path}: cannot be loaded: {error}") from error
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: a safetensors file is damaged or cut short ({error}); copy it again"
                ) from error
            raise
        _forget_former_names(model)
        _attach_decoder(model, pretrained_model_name_or_path)
        refuse_gaps(str(pretrained_model_name_or_path), info, quantized=getattr(model, "hf_quantizer", None))
        return (model, info) if wants_info else model

    @classmethod
    def _from_parts(cls, name: str | Path, folder: Path, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` for trained parts that lie in ``folder``; name: what they are called by."""
        wants_info = kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None)
        if not isinstance(config, MllmConfig):
            config = MllmConfig.from_pretrained(config or folder)
        for key in ("revision", "subfolder", "key_mapping"):
            kwargs.pop(key, None)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
        model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            None, *args, config=config, state_dict=whole_tensors(folder), output_loading_info=True, **kwargs
        )
        model.name_or_path = model.config.name_or_path = str(name)
        _attach_decoder(model, folder)
        refuse_gaps(str(name), info, quantized=getattr(model, "hf_quantizer", None))
        return (model, info) if wants_info else model

    def train(self, mode: bool = True) -> Any:
        """As in torch, but batch norms whose weights are frozen keep the statistics that they have: another trainer's adapters would
        not hold those that a frozen encoder gathered, and the model that is opened would answer otherwise.

        Args:
            mode: whether it trains.

        Returns:
            The model.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
                module.training = False
        return self

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers; the diffusion decoder of the model's visual tokenizer goes with it, in ``diffusion_decoder/``."""
        super().save_pretrained(save_directory, *args, **kwargs)
        by_umask(save_directory)
        if (
            self.config.visual_tokenizer is not None
            and hasattr(self, "image_tokenizer")
            and kwargs.get("is_main_process", True)
        ):
            carry(self.image_tokenizer, save_directory)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_foreign(cls, found: ForeignCheckpoint) -> Any:
        """A model in eval mode with every weight of a foreign checkpoint. Raises `CheckpointError` for weights that are missing,
        of another shape, or without a place."""
        model = cls(found.config).to(found.dtype)  # pyright: ignore[reportArgumentType]
        for name in found.unread:
            model.get_submodule(f"model.vision_tower.encoders.{name}").load_pretrained()  # type: ignore[operator]
        wanted = model.state_dict()
        own = tuple(f"model.vision_tower.encoders.{name}." for name in found.unread)
        tensors = dict(found.tensors)
        info = {
            "missing_keys": [name for name in wanted if name not in tensors and not name.startswith(own)],
            "unexpected_keys": [name for name in tensors if name not in wanted],
            "mismatched_keys": [n for n, t in tensors.items() if n in wanted and wanted[n].shape != t.shape],
        }
        refuse_gaps(str(found.where), info)
        model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        if found.generation is not None:
            model.generation_config = found.generation
        return model.eval()

    # Parts by name -------------------------------------------------------------------------------------------------

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        """Part → its modules by name: ``language_model``, ``connector``, ``router``, ``encoders.<name>`` …"""
        raise NotImplementedError

    def part_of(self, parameter_name: str) -> str:
        """The part that a parameter belongs to. Works on names with a PEFT or engine prefix too."""
        for part, prefixes in self.part_prefixes().items():
            for prefix in prefixes:
                if parameter_name.startswith(prefix) or f".{prefix}" in parameter_name:
                    return part
        raise KeyError(f"parameter {parameter_name!r} belongs to no part")

    def part_prefixes(self) -> dict[str, list[str]]:
        """Part → prefixes of its parameters' names, most specific part first."""
        root = "model." if hasattr(self, "model") else ""
        parts: dict[str, list[str]] = {}
        for name in self.config.encoders:
            parts[f"encoders.{name}"] = [f"{root}vision_tower.encoders.{name}."]
        if self.config.router is not None:
            parts["router"] = [f"{root}vision_tower.router."]
        if self.config.connector is not None:
            parts["connector"] = [f"{root}multi_modal_projector."]
            if self.config.view_layout().fast is not None:
                parts["slow_attention"] = [f"{root}slow_attention."]
        if self.config.visual_tokenizer is not None and reader_of(self.config.visual_tokenizer) is None:
            parts["visual_tokenizer"] = [f"{root}visual_tokenizer."]
        parts |= {f"heads.{name}": [f"heads.{name}."] for name in heads_with_weights(self.config.heads)}
        parts["language_model"] = [f"{root}language_model.", "lm_head."]
        return parts

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        super().gradient_checkpointing_enable(*args, **kwargs)
        for module in self.modules():
            if hasattr(module, "set_gradient_checkpointing"):
                module.set_gradient_checkpointing(True)  # pyright: ignore[reportCallIssue]

    def gradient_checkpointing_disable(self) -> None:
        super().gradient_checkpointing_disable()
        for module in self.modules():
            if hasattr(module, "set_gradient_checkpointing"):
                module.set_gradient_checkpointing(False)  # pyright: ignore[reportCallIssue]
