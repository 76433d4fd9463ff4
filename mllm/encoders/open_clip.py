"""Which features does the image side of an open_clip model give?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import open_clip
from open_clip.model import _build_vision_tower  # no public way builds the image side alone
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mllm.damage import read_json
from mllm.encoders import timm as timm_adapter
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import ImageEncoderConfig, LayerOutput, LibraryEncoder, map_to_tokens, take_layers
from mllm.encoders.weights import load_exactly, local_path, read_weights, resize_positions, strip_prefix, unavailable
from mllm.errors import CheckpointError, ConfigError, did_you_mean
from mllm.types import ImageSpec

_RESIZE = {"shortest": "crop", "longest": "letterbox", "squash": "squash"}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


class OpenClipConfig(ImageEncoderConfig):
    """The image side of an open_clip model."""

    architecture: str | dict[str, Any]
    """open_clip's model name, the path of an ``open_clip_config.json``, or the contents of one (``embed_dim``,
    ``vision_cfg``)."""
    quick_gelu: bool | None = None
    """OpenAI's activation. Default: what the architecture or the weights' tag says."""


class OpenClipEncoder(LibraryEncoder):
    """CLIP, SigLIP, ConvNeXt, EVA-02, ViTamin, MobileCLIP … by open_clip's names.

    ``weights.source``: a tag of that architecture (``laion2b_s34b_b79k``), ``hf-hub:<id>``, or a local file of the
    whole model or of its image side.
    """

    Config: ClassVar[type[EncoderConfig]] = OpenClipConfig
    config: OpenClipConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        vision = {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4}
        return {
            "type": "open_clip",
            "architecture": {"embed_dim": 16, "vision_cfg": vision},
            "layers": [-2, -1],
            "keep_prefix": True,
        }

    @classmethod
    def complete(cls, config: OpenClipConfig) -> Any:
        architecture = config.architecture
        preset: dict[str, Any] = {}
        if isinstance(architecture, str):
            is_file = architecture.endswith(".json")
            architecture, preprocessing = read_architecture(architecture)
            preset = {k: v for k, v in preprocessing.items() if getattr(config, k) is None}
            if is_file:
                preset["architecture"] = architecture
        if "vision_cfg" not in architecture or "embed_dim" not in architecture:
            raise ConfigError("architecture: expected open_clip's keys embed_dim and vision_cfg")
        published = _tag_settings(config)
        if config.quick_gelu is None:
            preset["quick_gelu"] = bool(architecture.get("quick_gelu") or published.get("quick_gelu"))
        for key, value in (("mean", published.get("mean")), ("std", published.get("std"))):
            if value is not None and getattr(config, key) is None and key not in preset:
                preset[key] = tuple(value)
        if config.resize is None and published.get("resize_mode") in _RESIZE and "resize" not in preset:
            preset["resize"] = _RESIZE[published["resize_mode"]]
        return config.model_copy(update=preset)

    @classmethod
    def default_image(cls, config: OpenClipConfig) -> ImageSpec:
        settings = vision_settings(config)
        size = settings.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        trunk = str(settings.get("timm_model_name") or "")
        is_siglip = "siglip" in trunk
        return ImageSpec(
            height=height,
            width=width,
            mean=_HALF if is_siglip else _CLIP_MEAN,
            std=_HALF if is_siglip else _CLIP_STD,
            resize="squash" if is_siglip else "crop",
        )

    @classmethod
    def build(cls, config: OpenClipConfig) -> nn.Module:
        settings = vision_settings(config)
        if settings.get("timm_model_name"):
            model = timm_adapter.create(
                settings["timm_model_name"], config.resolved_info.image, _timm_options(settings)
            )
            timm_adapter.cut(model, config)
            return model
        model = _native(settings, config)
        cut(model, config)
        return model

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        if isinstance(self.model, VisionTransformer | ModifiedResNet):
            return native_layers(self.model, pixels, self.config)
        return timm_adapter.timm_layers(self.model, pixels, self.config)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        timm_adapter.set_checkpointing(self.model, enabled)

    def load_pretrained(self) -> None:
        weights = self.required_weights()
        path = local_path(weights.source)
        if path is None:
            path = _download(self.config, weights.source, weights.revision)
        state = read_weights(path)
        settings = vision_settings(self.config)
        if any(key.startswith("visual.") for key in state):
            state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        trunk = settings.get("timm_model_name")
        if trunk:
            if any(key.startswith("trunk.") for key in state):
                state = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
            timm_adapter.load_timm(
                self.model, state, trunk, self.config.resolved_info.image, _timm_options(settings), str(weights.source)
            )
            return
        state = _fit_native(strip_prefix(state, set(self.model.state_dict())), self.model)
        full = _native(settings, self.config) if isinstance(self.model, VisionTransformer) else self.model
        load_exactly(self.model, state, source=weights.source, known=full.state_dict())


def read_architecture(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(open_clip model config, preprocessing overrides) of a model name or a JSON file. Raises `ConfigError`."""
    if name.endswith(".json"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"architecture: no such file {name}")
        data = read_json(path)
        found = data.get("preprocess_cfg", {})
        return data.get("model_cfg", data), {key: tuple(found[key]) for key in ("mean", "std") if key in found}
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise ConfigError(
            f"architecture: open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())} "
            "(python -c 'import open_clip; print(open_clip.list_models())')"
        )
    return settings, {}


def vision_settings(config: OpenClipConfig) -> dict[str, Any]:
    """``vision_cfg`` of a config."""
    architecture = config.architecture
    if isinstance(architecture, str):
        architecture, _ = read_architecture(architecture)
    return architecture["vision_cfg"]


def _tag_settings(config: OpenClipConfig) -> dict[str, Any]:
    """open_clip's preprocessing of the tag that ``weights.source`` names, {} for other sources."""
    if config.weights is None or not isinstance(config.architecture, str):
        return {}
    return get_pretrained_cfg(config.architecture, config.weights.source) or {}


def _timm_options(settings: dict[str, Any]) -> dict[str, Any]:
    """What open_clip passes to timm and changes the trunk: its pooling decides where the last norm sits when timm's
    own head does the projection. Stochastic depth, for training from scratch, is left out."""
    options: dict[str, Any] = {}
    pool, projection = settings.get("timm_pool", "avg"), settings.get("timm_proj", "linear")
    if projection not in ("linear", "mlp") and pool not in ("abs_attn", "rot_attn"):
        options["global_pool"] = pool
    return options


def _native(settings: dict[str, Any], config: OpenClipConfig) -> nn.Module:
    architecture = config.architecture
    if isinstance(architecture, str):
        architecture, _ = read_architecture(architecture)
    size = (config.resolved_info.image.height, config.resolved_info.image.width)
    # Patch dropout, for training from scratch, would tear holes into the grid.
    settings = {**settings, "image_size": size if size[0] != size[1] else size[0], "patch_dropout": 0.0}
    try:
        return _build_vision_tower(architecture["embed_dim"], settings, bool(config.quick_gelu))  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"architecture.vision_cfg: {error}") from error


def cut(model: nn.Module, config: OpenClipConfig) -> None:
    """Drop what lies behind the deepest layer that is needed. In place."""
    if not isinstance(model, VisionTransformer):
        take_layers(config.layers, 5, lowest=1)
        model.attnpool = nn.Identity()
        return
    depth = len(model.transformer.resblocks)
    counts = take_layers(config.layers, depth, lowest=1)
    model.num_layers_before_cut = depth  # type: ignore[assignment]
    uses_norm = config.final_norm and depth in counts and model.attn_pool is None
    model.attn_pool = None
    model.prune_intermediate_layers([k - 1 for k in sorted(set(counts))], prune_norm=not uses_norm, prune_head=True)


def native_layers(
    model: VisionTransformer | ModifiedResNet, pixels: Tensor, config: OpenClipConfig
) -> list[LayerOutput]:
    """Outputs of ``config.layers`` of open_clip's own ViT or ResNet."""
    is_vit = isinstance(model, VisionTransformer)
    depth = int(getattr(model, "num_layers_before_cut", 5))  # a ResNet has a stem and four stages
    counts = take_layers(config.layers, depth, lowest=1)
    wanted = sorted(set(counts))
    result = model.forward_intermediates(
        pixels,
        indices=[k - 1 for k in wanted],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC" if is_vit else "NCHW",
        output_extra_tokens=True,
    )
    maps = result["image_intermediates"]
    if not is_vit:
        outputs = {count: map_to_tokens(feature_map) for count, feature_map in zip(wanted, maps)}
        return [outputs[count] for count in counts]
    rows, cols = model.grid_size  # type: ignore[misc]
    outputs = {}
    for count, tokens, prefix in zip(wanted, maps, result["image_intermediates_prefix"]):
        if count == depth and config.final_norm:  # Identity where it was pruned
            tokens, prefix = model.ln_post(tokens), model.ln_post(prefix)
        outputs[count] = LayerOutput(tokens, (int(rows), int(cols)), prefix)
    return [outputs[count] for count in counts]


def _fit_native(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position table of a ViT brought to the model's grid."""
    key = "positional_embedding"
    if (
        not isinstance(model, VisionTransformer)
        or key not in state
        or state[key].shape == model.positional_embedding.shape
    ):
        return state
    side = int((state[key].shape[0] - 1) ** 0.5)
    grid = tuple(int(x) for x in model.grid_size)
    table = resize_positions(state[key], (side, side), grid, num_prefix_tokens=1)  # type: ignore[arg-type]
    return {**state, key: table}


def _download(config: OpenClipConfig, source: str, revision: str | None) -> Path:
    """Path of a tag's or a hub repository's weights. Raises `CheckpointError` for an unknown tag, `UnavailableError`
    without network."""
    try:
        if source.startswith("hf-hub:"):
            return Path(download_pretrained_from_hf(source.removeprefix("hf-hub:"), revision=revision))
        name = config.architecture
        published = get_pretrained_cfg(name, source) if isinstance(name, str) else None
        if not published:
            tags = open_clip.list_pretrained_tags_by_model(name) if isinstance(name, str) else []
            hub = f" A repository on the hub is written hf-hub:{source}." if source.count("/") == 1 else ""
            known = f" Known tags of {name}: {', '.join(tags)}" if tags else ""
            raise CheckpointError(
                f"weights: {source!r} is no local file, no hf-hub:<id> and no open_clip tag{did_you_mean(source, tags) or '.'}"
                f"{hub}{known}"
            )
        return Path(download_pretrained(published))
    except CheckpointError:
        raise
    except Exception as error:
        raise unavailable(source, error) from error
