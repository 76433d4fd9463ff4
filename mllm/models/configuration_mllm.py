"""What does a checkpoint's config.json say?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mllm.checkpoint_code import KEY, Part, admit_code, record_code
from mllm.config import to_plain
from mllm.door import AUTO_MAP, SavesDoor
from mllm.errors import CheckpointError, ConfigError
from mllm.heads.build import drawing_head
from mllm.plugins import code_hashes
from mllm.processing.layout import LayoutRules, layout_rules
from mllm.types import EncoderInfo, ViewLayout, VisualLayout

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_SETTINGS = {
    "final_logit_softcapping": ("softcap", False),
    "logits_scaling": ("scale", True),
    "logit_scale": ("scale", False),
    "lm_head_multiplier": ("scale", False),
    "logits_mup_width_multiplier": ("scale", True),
}
"""A language model's own setting → what it does to the logits, and whether these are divided by it."""
_MULTIPLIES = ("hyperclovax",)
"""Language models that multiply by ``logits_scaling``."""


class MllmConfig(SavesDoor, PreTrainedConfig):
    """Everything that is needed to build the model offline.

    text_config: the language model's HF config; encoders: name → resolved encoder config, in ``encoder_order``;
    connector, router, visual_tokenizer: component configs (None: the model has no such part); visual_tokenizer may be
    ``{"encoder": name}``, the tokenizer inside that encoder; heads: name → config of what answers besides text; visual_head: the
    former place of the one head, read as ``heads["visual_head"]``; views: the way of looking at a picture (None: once, as a
    whole);
    video: which frames of a video are seen, `mllm.processing.frames.VideoSpec` (None: the model takes no video);
    modality_switch: every decoder layer has weights of its own for visual tokens;
    positions: of a language model with several position axes (M-RoPE), grid: visual tokens stand where their map says; text: all axes are
    alike; None: grid, where there are several;
    num_token_ids: one past the largest id that the tokenizer has; rows from there on fill the tables up and are never written (None:
    not known); image_token_id: the placeholder's id; added_token_ids: first and one past the last id of tokens that the language model's
    source did not have (None: not known, or a model from scratch); plugins: the code of third parties that the checkpoint carries
    (`mllm.checkpoint_code`). The number of visual tokens is derived (`layout`), never stored.
    """

    model_type = "mllm"
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType]
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "routing", "losses"]
    """What transformers' Trainer leaves out of predictions: it gathers tensors alone."""

    def __init__(
        self,
        text_config: Any = None,
        encoders: Mapping[str, Any] | None = None,
        encoder_order: list[str] | None = None,
        connector: Any = None,
        views: Any = None,
        video: Any = None,
        router: Any = None,
        visual_tokenizer: Any = None,
        heads: Mapping[str, Any] | None = None,
        visual_head: Any = None,
        image_token_id: int | None = None,
        lm_head_bias: bool = False,
        modality_switch: bool = False,
        positions: str | None = None,
        added_token_ids: Sequence[int] | None = None,
        num_token_ids: int | None = None,
        plugins: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ):
        if text_config is None:
            text_config = CONFIG_MAPPING["llama"]()
        elif isinstance(text_config, Mapping):
            text_config = language_model_config(text_config)
        self.text_config = text_config
        # transformers writes JSON with sorted keys; the order of encoders is part of the model (channel concatenation).
        self.encoder_order = list(encoder_order if encoder_order is not None else encoders or {})
        self.encoders = {name: to_plain((encoders or {})[name]) for name in self.encoder_order}
        self.connector = None if connector is None else to_plain(connector)
        self.views = None if views is None else to_plain(views)
        self.video = None if video is None else to_plain(video)
        self.router = None if router is None else to_plain(router)
        self.visual_tokenizer = None if visual_tokenizer is None else to_plain(visual_tokenizer)
        former = {} if visual_head is None else {"visual_head": visual_head}
        self.heads = {name: to_plain(head) for name, head in {**former, **(heads or {})}.items()}
        self.image_token_id = image_token_id
        self.lm_head_bias = lm_head_bias
        self.modality_switch = modality_switch
        self.positions = positions
        self.added_token_ids = None if added_token_ids is None else list(added_token_ids)
        self.num_token_ids = num_token_ids
        self.plugins = [dict(entry) for entry in plugins]
        self.auto_map = dict(AUTO_MAP)
        for former in ("auto_map", "opens_with"):
            kwargs.pop(former, None)
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def unassigned_ids(self) -> range:
        """Ids that the tables have rows for and the tokenizer no token."""
        end = self.num_token_ids or (self.added_token_ids or (0, 0))[1]
        size = self.get_text_config().vocab_size
        return range(min(end, size), size) if end else range(0)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Args:
            pretrained_model_name_or_path: a folder or hub id.
            kwargs: as transformers takes them.

        Returns:
            The config.

        Raises:
            CheckpointError: the model needs plug-in code that is not allowed to run.
        """
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))  # Auto classes say it too
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers.

        Args:
            config_dict: what config.json holds.
            kwargs: as transformers takes them.

        Returns:
            The config.

        Raises:
            CheckpointError: it is of another kind of model, or needs plug-in code that is not allowed to run.
        """
        place = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise CheckpointError(
                f"{place or 'config'}: a {kind} checkpoint, not one of mllm; `mllm convert` makes one of LLaVA and Prismatic, a "
                "recipe's model.language_model.source takes a language model"
            )
        fetch = partial(_checkpoint_file, place, config_dict.get("_commit_hash"))
        admit_code(place or "config", config_dict.get(KEY) or (), list(component_types(config_dict)), fetch)
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; the plug-in files that define the model's parts are copied beside ``config.json``.

        Args:
            save_directory: a folder, made where it is missing.
            kwargs: as transformers takes them.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.plugins = record_code(component_types(vars(self)), save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def encoder_infos(self) -> dict[str, EncoderInfo]:
        """Encoder name → sizes, in the model's order."""
        return {name: EncoderInfo.model_validate(config["info"]) for name, config in self.encoders.items()}

    @property
    def drawing_head(self) -> dict[str, Any] | None:
        """Config of the head that draws; None for a model that draws nothing."""
        name = drawing_head(self.heads)
        return None if name is None else self.heads[name]

    def layout_rules(self) -> LayoutRules:
        """How visuals are looked at and lie in the token sequence; a model without images gives them no token."""
        return layout_rules(self, self.encoder_infos())

    def view_layout(self) -> ViewLayout:
        """What the connector makes of one view."""
        return self.layout_rules().view

    def layout(self, size: tuple[int, int] | None = None) -> VisualLayout:
        """How a visual lies in the token sequence.

        Args:
            size: (height, width) in pixels; matters for some views only.

        Returns:
            Number of tokens, their grid, separators and literal text.
        """
        return self.layout_rules().layout(size)


def component_types(config: Mapping[str, Any]) -> Iterator[Part]:
    """The components that a config names, with the registries that know them."""
    from mllm.connectors import CONNECTORS
    from mllm.encoders import ENCODERS
    from mllm.heads import HEADS
    from mllm.processing.views import VIEWS
    from mllm.routers import ROUTERS
    from mllm.visual_tokenizers import VISUAL_TOKENIZERS

    single = {"connector": CONNECTORS, "router": ROUTERS, "visual_tokenizer": VISUAL_TOKENIZERS}
    named = [(key, registry, config.get(key)) for key, registry in single.items()]
    named.append(("connector.each", CONNECTORS, (config.get("connector") or {}).get("each")))
    named.append(("views", VIEWS, config.get("views") or {"type": "single"}))
    named += [(f"heads.{name}", HEADS, head) for name, head in (config.get("heads") or {}).items()]
    named.append(("visual_head", HEADS, config.get("visual_head")))
    for name, encoder in (config.get("encoders") or {}).items():
        named.append((f"encoders.{name}", ENCODERS, encoder))
        named.append((f"encoders.{name}.tokenizer", VISUAL_TOKENIZERS, encoder.get("tokenizer")))
    for where, registry, part in named:
        if isinstance(part, Mapping) and isinstance(part.get("type"), str):  # a tokenizer may be ``{"encoder": name}``
            yield Part(where, registry, part["type"])


def component_code(config: PreTrainedConfig) -> list[str]:
    """SHA-256 of every plug-in file that a component of this model is defined in, as loaded here; [] for another project's."""
    if not isinstance(config, MllmConfig):
        return []
    return code_hashes(part.registry.get(part.type) for part in component_types(vars(config)))


def _checkpoint_file(place: str, revision: str | None, name: str) -> Path:
    """A file of a checkpoint folder or hub repository. A hub file is downloaded, to be read."""
    if Path(place).is_dir() or not place:
        return Path(place) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, name, revision=revision))


def language_model_config(data: Mapping[str, Any]) -> PreTrainedConfig:
    """An HF config object from its dict. Raises `ConfigError` for an unknown ``model_type``."""
    data = dict(data)
    model_type = data.pop("model_type", None)
    if model_type is None:
        raise ConfigError("language_model.config: model_type is required (for example llama, qwen2, gemma3_text)")
    try:
        cls = CONFIG_MAPPING[model_type]
    except KeyError:
        from mllm.errors import UnknownName

        raise UnknownName("language_model.config.model_type", model_type, CONFIG_MAPPING.keys()) from None
    return cls(**data)


def head_settings(text_config: PreTrainedConfig) -> dict[str, float]:
    """How the language model treats its logits after the head (Gemma's soft cap, the scales of Granite, Cohere, Falcon-H1 …).

    Args:
        text_config: the language model's.

    Returns:
        ``scale``, which the logits are multiplied by, and ``softcap``, each where there is one.
    """
    found: dict[str, float] = {}
    for name, (what, divides) in _HEAD_SETTINGS.items():
        value = getattr(text_config, name, None)
        if value is None:
            continue
        if what == "scale":
            divides = divides and text_config.model_type not in _MULTIPLIES
            value = found.get(what, 1.0) / value if divides else found.get(what, 1.0) * value
        found[what] = value
    return found


def treated(logits: Tensor, settings: Mapping[str, float]) -> Tensor:
    """Logits as a language model gives them.

    Args:
        logits: what its head gave ``(…, V)``.
        settings: `head_settings`.

    Returns:
        ``(…, V)``, scaled and capped.
    """
    if "scale" in settings:
        logits = logits * settings["scale"]
    if "softcap" in settings:
        logits = (logits / settings["softcap"]).tanh() * settings["softcap"]
    return logits
