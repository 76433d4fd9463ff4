"""How does a foreign image processor fit pictures to its encoder, in our encoder's words?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import ConfigError
from mllm.models.foreign.settings import Settings, read_json

_PROCESSORS = {
    "llava": ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"),
    "llava_next": ("LlavaNextImageProcessor",),
    "llava_onevision": ("LlavaOnevisionImageProcessor",),
    "internvl": ("GotOcr2ImageProcessor",),
}
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_FILES = ("preprocessor_config.json", "processor_config.json")


def image_settings(folder: Path, kind: str = "llava", *, grids: list[list[int]] | None = None) -> dict[str, Any]:
    """``image_size, mean, std, resize, interpolation`` of the folder's image processor; empty without one. kind: the model's, as
    `recognise` says; grids: the sizes that the model's config has for pictures in tiles, whose processor must have the same.

    Raises `ConfigError` for a setting under which our pixels would be others.
    """
    found = _processor_file(folder)
    return {} if found is None else _read(Settings(found[1], found[0]), found[0], kind, grids)


def processor_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the folder's image processor as written; None without one."""
    found = _processor_file(folder)
    return None if found is None else found[1]


def _processor_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for file in (folder / name for name in _FILES):
        if file.is_file():
            data = read_json(file)
            inner = data.get("image_processor", data)
            if isinstance(inner, dict) and (
                "image_mean" in inner or "size" in inner or "image_processor_type" in inner
            ):
                return file, inner
    return None


def _read(settings: Settings, file: Path, family: str, grids: list[list[int]] | None) -> dict[str, Any]:
    kind = settings.take("image_processor_type") or settings.take("feature_extractor_type")
    known = _PROCESSORS[family]
    if kind is not None and kind.removesuffix("Fast").removesuffix("Pil") not in known:
        raise ConfigError(f"{file}: image processor {kind!r} is not supported; known: {', '.join(known)}")
    settings.expect("do_resize", (True, None), "every picture would need the encoder's size already")
    settings.expect("do_rescale", (True, None), "ours divides by 255")
    settings.expect("do_convert_rgb", (True, None), "ours converts every picture to RGB")
    factor = settings.take("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{file}: rescale_factor: {factor} is not supported: ours divides by 255")
    settings.harmless(
        "processor_class", "feature_extractor_type", "_valid_processor_keys", "default_to_square", "device"
    )
    settings.harmless(
        "data_format", "input_data_format", "return_tensors", "disable_grouping", "image_seq_length", "pad_size"
    )
    crops = bool(settings.take("do_center_crop", _crops_by_default(settings)))
    if family == "internvl":  # its processor cuts tiles whatever the file says
        settings.harmless("crop_to_patches", "min_patches", "max_patches", "size", "do_pad")
        result: dict[str, Any] = {"resize": "squash"}
    elif grids is None:
        result = {"resize": _fit(settings, file, cropped=crops)}
    else:  # tiles are squashed to the encoder's size by the views; do_pad is about batches then
        settings.expect("image_grid_pinpoints", (grids, None), f"the model's config has {grids}")
        settings.harmless("do_pad", "aspect_ratio_setting", "size")
        result = {"resize": "squash"}
    size = _sides(settings.take("crop_size")) if crops else None
    size = size or _sides(settings.take("size"))
    if size:
        result["image_size"] = size
    settings.take("crop_size")
    mean, std = settings.take("image_mean"), settings.take("image_std")
    if settings.take("do_normalize", True) is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is not None and std is not None:
        result |= {"mean": mean, "std": std}
    filter_ = settings.take("resample")
    if filter_ is not None:
        if filter_ not in _FILTERS:
            raise ConfigError(f"{file}: resample: {filter_!r} is not supported; known: {_FILTERS}")
        result["interpolation"] = _FILTERS[filter_]
    settings.finish()
    return result


def _fit(settings: Settings, file: Path, *, cropped: bool) -> str:
    """``squash``, ``letterbox`` or ``crop``: what padding, resizing and cropping amount to."""
    size, crop = settings.take("size"), settings.take("crop_size")
    short = size if isinstance(size, int) else (size or {}).get("shortest_edge")
    if isinstance(size, int) and not cropped:
        short = None  # an early CLIP processor's bare number: a square
    target = _sides(crop) if cropped else None
    if settings.take("do_pad"):
        if _sides(size) and (target is None or target == _sides(size)):
            return "letterbox"  # a square picture meets a square size
        raise ConfigError(
            f"{file}: do_pad with size {size} and crop_size {crop} is not supported: they must be one square"
        )
    if short is None:
        if target is not None and _sides(size) and target != _sides(size):
            raise ConfigError(f"{file}: size {size} is cropped to {crop}; ours does not crop after squashing")
        return "squash"
    if target is None:
        raise ConfigError(
            f"{file}: size {size} keeps the picture's shape and nothing crops it; pictures would differ in size"
        )
    if target != (short, short):
        raise ConfigError(
            f"{file}: pictures are resized to {short} and cropped to {target}; ours resizes to the size of the crop"
        )
    return "crop"


def _crops_by_default(settings: Settings) -> bool:
    """CLIP's and LLaVA's classes crop unless told not to; SigLIP's never does."""
    kind = settings.take("image_processor_type") or settings.take("feature_extractor_type") or "CLIPImageProcessor"
    return not kind.startswith("Siglip") and settings.take("crop_size") is not None


def _sides(size: Any) -> tuple[int, int] | None:
    """(height, width) that a size setting means, where it means one."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "height" in size:
        return size["height"], size["width"]
    if isinstance(size, dict) and size.get("shortest_edge"):
        return size["shortest_edge"], size["shortest_edge"]
    return None
