"""Which settings of transformers' processors would be taken here and change nothing? They are refused: whoever gives one expects other
pixels, or other frames, than the model would see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.errors import ConfigError

_ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_DECIDED = (
    "size",
    "crop_size",
    "pad_size",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
    "image_seq_length",
)
_FRAMES = ("num_frames", "fps", "video_metadata")


def refuse_unread(settings: Mapping[str, Any], audio: Any = None) -> None:
    """Raises `ConfigError` for a setting of a processor's call that nothing here reads.

    Args:
        settings: of the call, those for pictures and videos also inside ``images_kwargs`` and ``videos_kwargs``.
        audio: what was given as audio.
    """
    if audio is not None:
        raise ConfigError("audio: no model here hears; leave it out")
    flat = {**settings, **(settings.get("images_kwargs") or {}), **(settings.get("videos_kwargs") or {})}
    told = {name: value for name, value in flat.items() if value is not None}
    for name in _FRAMES:
        if name in told:
            raise ConfigError(
                f"{name}: which frames of a video are seen is part of the model (config.video), in training and answers alike; for frames "
                "of your own give mllm.types.Video(path, frames=(0, 5, 9)), for a part of it start and end"
            )
    if told.get("do_sample_frames") is False:
        raise ConfigError(
            "do_sample_frames=False: a video's frames are chosen as the model's config.video says; mllm.types.scene(pictures) shows all"
        )
    undone = [name for name in _ALWAYS_DONE if told.get(name) is False] + [
        name for name in ("do_center_crop", "do_pad") if told.get(name)
    ]
    for name in [*undone, *(name for name in _DECIDED if name in told)]:
        raise ConfigError(
            f"{name}={told[name]!r}: how pixels are made is part of each encoder (its size, mean and std), and no setting of a call; a "
            "recipe's model.encoders.NAME.image_size chooses a size"
        )
    if str(getattr(told.get("data_format"), "value", told.get("data_format", "channels_first"))) != "channels_first":
        raise ConfigError(f"data_format={told['data_format']!r}: pixels are (views, channels, height, width)")
