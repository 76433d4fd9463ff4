"""Which frames of a video does a model see, and what is written beside them? One specification for data, processor, `generate`,
evaluation and serving."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError, DataError
from mllm.processing.spread import middles, spread
from mllm.types import Video


class VideoSpec(StrictModel):
    """A model's ``video:`` section. Give ``frames`` (so many of any video) or ``fps`` (so many of a second)."""

    frames: int | None = Field(default=None, ge=1)
    """How many; a video with fewer is seen whole."""
    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Frames of a second: those shown at 0, 1/fps, 2/fps … seconds."""
    max_frames: int = Field(default=64, ge=1)
    """The most that ``fps`` or keyframes may give; beyond it they are spread over the whole video."""
    which: Literal["uniform", "middle", "keyframes", "space_aware"] = "uniform"
    """uniform: evenly from the first frame to the last (``linspace``, as LLaVA-Video, MERV and Spatial-MLLM). middle: the middle of
    equal parts (PVC, InternVL). keyframes: those that the file stores whole. space_aware: those of ``candidates`` that together show most
    of the scene (Spatial-MLLM), by its points: a row's poses and depths, or a file of points."""
    candidates: int = Field(default=128, ge=2)
    """space_aware: of how many frames, evenly from the first to the last."""
    max_pixels: int | None = Field(default=None, ge=1)
    """A frame with more is scaled down to so many as soon as it is decoded, its shape kept."""
    stamp: str | None = None
    """Text before each frame: ``"{seconds:.1f}s: "`` or ``"Frame {number}: "`` (from 1). None: frames follow one another."""
    positions_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Language models with several position axes (M-RoPE): so many positions in time lie between frames a second apart (Qwen2.5-VL: 2).
    None: frames that follow one another are one apart (Qwen2-VL)."""
    max_seconds: float = Field(default=4 * 3600, gt=0)
    """A longer video is refused before it is read."""
    fewer: dict[str, int] = {}
    """Encoder → how many of the frames it is given at most, evenly from the first on (``{geometry: 8}`` of 16: every second). Between
    them its features of the frame before stand."""

    @model_validator(mode="after")
    def _one_count(self) -> VideoSpec:
        if self.which == "keyframes":
            if self.frames is not None or self.fps is not None:
                raise ValueError("which: keyframes takes max_frames; leave out frames and fps")
        elif (self.frames is None) == (self.fps is None):
            raise ValueError("give either frames (so many of any video) or fps (so many of a second)")
        elif self.which == "space_aware" and (self.frames is None or self.frames > self.candidates):
            raise ValueError(
                "which: space_aware chooses some of the candidates; give frames, at most candidates, and leave out fps"
            )
        elif self.fps is not None and self.which == "middle":
            raise ValueError("which: middle spreads a number of frames; give frames, not fps")
        own = type(self).model_fields
        for name, needs, wanted in (
            ("max_frames", "fps or which: keyframes", self.frames is None or self.frames <= self.max_frames),
            ("candidates", "which: space_aware", self.which == "space_aware"),
        ):
            if not wanted and getattr(self, name) != own[name].default:
                raise ValueError(
                    f"{name}: {getattr(self, name)} changes nothing here, it goes with {needs}; leave it out"
                )
        for name, count in self.fewer.items():
            if not 1 <= count < self.most:
                raise ValueError(
                    f"fewer.{name}: {count} is not between 1 and {self.most - 1}: a video has up to {self.most} frames"
                )
        if self.stamp is not None:
            if self.positions_per_second is not None:
                raise ValueError(
                    "positions_per_second: frames behind a stamp each stand by themselves; leave one of the two out"
                )
            try:
                self.stamp.format(seconds=1.0, number=1)
            except (LookupError, ValueError) as error:
                raise ValueError(
                    f"stamp: {self.stamp!r} is no text with {{seconds}} or {{number}} ({error}); e.g. '{{seconds:.1f}}s: '"
                ) from None
        return self

    @property
    def most(self) -> int:
        """The most frames that a video has."""
        return self.frames or self.max_frames

    def fewer_of(self, frames: int) -> tuple[tuple[str, int], ...]:
        """(encoder, how many it is given) of a video of so many frames, for those that are given fewer."""
        return tuple((name, count) for name, count in self.fewer.items() if count < frames)

    def stamps(self, milliseconds: Sequence[int]) -> list[str]:
        """The text before each frame; [] without ``stamp``."""
        if self.stamp is None:
            return []
        return [self.stamp.format(seconds=time / 1000, number=k + 1) for k, time in enumerate(milliseconds)]

    @property
    def tells_seconds(self) -> bool:
        """Whether the text beside a frame, or its position, says its time."""
        if self.stamp is None:
            return self.positions_per_second is not None
        return self.stamp.format(seconds=1.0, number=1) != self.stamp.format(seconds=2.0, number=1)


@dataclass(frozen=True)
class Chosen:
    """Frames of one video. numbers: which, in the order shown; seconds: when each place is, from the video's start (None:
    unknown)."""

    numbers: tuple[int, ...]
    seconds: tuple[float, ...] | None

    @property
    def milliseconds(self) -> list[int]:
        """What travels with the pixels: when each frame is, or its number where no times are known."""
        if self.seconds is None:
            return list(self.numbers)
        return [round(second * 1000) for second in self.seconds]


def video_spec(spec: Mapping[str, Any] | VideoSpec | None, where: str = "model.video") -> VideoSpec | None:
    """The strict form of a model's ``video:`` section. Raises `ConfigError` that starts with ``where``."""
    if spec is None or isinstance(spec, VideoSpec):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where}: expected a mapping such as {{frames: 16}} or {{fps: 1, max_frames: 64}}")
    return validate(VideoSpec, spec, where=where)


def choose(
    spec: VideoSpec,
    video: Video,
    count: int,
    times: Sequence[float] | None,
    *,
    keyframes: Sequence[int] = (),
    where: str,
) -> Chosen:
    """Frames of a video of ``count`` frames. times: when each is shown, in seconds and ascending, None where that is not known;
    keyframes: numbers of those stored whole. Raises `DataError` that opens with ``where``."""
    if count < 1:
        raise DataError(f"{where}: the video has no frames")
    given = video.start is not None or video.end is not None
    if times is None and (spec.tells_seconds or given or (spec.fps is not None and video.frames is None)):
        asks = "its start and end speak" if given else "the model's video section speaks"
        raise DataError(
            f"{where}: {asks} of seconds, and nothing says when these frames are; give fps, or the seconds of each"
        )
    if video.frames is not None:
        wrong = [number for number in video.frames if not 0 <= number < count]
        if wrong or not video.frames:
            raise DataError(
                f"{where}: frame {wrong[0] if wrong else 'list'} {'of' if wrong else 'is empty; the video has'} {count}"
            )
        numbers = list(video.frames)
    else:
        first, last = _bounds(video, count, times, where)
        if spec.which == "space_aware" and spec.frames is not None and last - first + 1 > spec.frames:
            from mllm.processing.scene_points import frames_by_points  # torch is read when it is needed

            asked = {"frames": spec.frames, "candidates": spec.candidates, "first": first, "last": last, "count": count}
            numbers = frames_by_points(video, **asked, where=where)
        else:
            numbers = _numbers(spec, first, last, times, keyframes)
    seconds = None if times is None else tuple(times[number] for number in numbers)
    chosen = Chosen(in_order(video.play, numbers, video.key), seconds)
    for told in _told:
        told.append(chosen)
    return chosen


_told: list[list[Chosen]] = []


@contextmanager
def choices_told() -> Iterator[list[Chosen]]:
    """What is chosen of every video in this process inside the block, in order."""
    found: list[Chosen] = []
    _told.append(found)
    try:
        yield found
    finally:
        _told[:] = [told for told in _told if told is not found]


def _bounds(video: Video, count: int, times: Sequence[float] | None, where: str) -> tuple[int, int]:
    """First and last frame between a video's start and end."""
    if times is None or (video.start is None and video.end is None):
        return 0, count - 1
    start, end = video.start or 0.0, times[-1] if video.end is None else video.end
    if not 0 <= start <= end or start > times[-1]:
        raise DataError(f"{where}: from {start:g} to {end:g} s is no part of a video of {times[-1]:g} s")
    first = max(bisect.bisect_right(times, start + _SAME) - 1, 0)
    return first, max(bisect.bisect_right(times, end + _SAME) - 1, first)


_SAME = 1e-6
"""Seconds within which a frame counts as shown."""


def _numbers(
    spec: VideoSpec, first: int, last: int, times: Sequence[float] | None, keyframes: Sequence[int]
) -> list[int]:
    if spec.which == "keyframes":
        found = [number for number in keyframes if first <= number <= last] or [first]
        return [found[k] for k in spread(len(found), min(spec.max_frames, len(found)))]
    if spec.fps is not None:
        assert times is not None
        return _shown_at(_seconds(spec.fps, spec.max_frames, times[first], times[last]), times, first)
    assert spec.frames is not None
    available = last - first + 1
    places = (middles if spec.which == "middle" else spread)(available, min(spec.frames, available))
    return [first + place for place in places]


def _seconds(fps: float, most: int, start: float, end: float) -> list[float]:
    count = int((end - start) * fps + _SAME) + 1
    if count <= most:
        return [start + k / fps for k in range(count)]
    return [start + (end - start) * place / max(most - 1, 1) for place in range(most)]


def _shown_at(seconds: Sequence[float], times: Sequence[float], first: int) -> list[int]:
    return [max(bisect.bisect_right(times, second + _SAME) - 1, first) for second in seconds]


def in_order(play: str, numbers: Sequence[int], key: str = "") -> tuple[int, ...]:
    """Frames as `Video.play` lets them follow one another; shuffled by ``key``, the same key always alike, and never left as they were
    where there is another order."""
    if play == "reversed":
        return tuple(reversed(numbers))
    if play == "frozen":
        return (numbers[len(numbers) // 2],) * len(numbers)
    if play == "shuffled" and len(set(numbers)) > 1:
        rng = random.Random(f"{key}\n{list(numbers)}")
        order = list(numbers)
        while order == list(numbers):
            rng.shuffle(order)
        return tuple(order)
    return tuple(numbers)
