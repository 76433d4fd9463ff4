"""What is said of a video or a picture is done or refused, whichever way it comes: never taken and left out."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from mllm.data.conversations import message_turns
from mllm.data.sources import open_source, resolve_visual
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.processing.chat import encode_sample
from mllm.processing.frames import VideoSpec, video_spec
from mllm.processing.videos import frames_of
from mllm.types import Video, scene
from tests.helpers import picture, tiny_model
from tests.videos import write_clip

QUESTION = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 21))  # 10 a second


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("model"), video={"frames": 3})[1]


def ask(processor: Any, *parts: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        [{"role": "user", "content": [*parts, QUESTION]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def test_part_of_a_video_is_the_same_in_every_way_of_asking_for_it(processor: Any, clip: str) -> None:
    entry = {"path": clip, "start": 0.5, "end": 1.5}
    part = {"type": "video", "video": clip, "start": 0.5, "end": 1.5}
    whole = {"type": "video", "video": entry}
    wanted = [[500, 1000, 1500]]
    for way in (part, whole, {"type": "video_url", "video_url": {"url": clip}, "start": 0.5, "end": 1.5}):
        assert ask(processor, way)["video_times"].tolist() == wanted, way
        rows = [{"role": "user", "content": [way, QUESTION]}, {"role": "assistant", "content": "a"}]
        (found,) = (resolve_visual(visual, None, "row") for visual in message_turns(rows, [], where="row")[1])
        assert frames_of(found, VideoSpec(frames=3), where="row").chosen.milliseconds == wanted[0], way
    assert processor(text="<video>", videos=entry, return_tensors="pt")["video_times"].tolist() == wanted
    seen = ask(processor, {"type": "video", "frames": [picture(k) for k in range(3)], "seconds": [0, 1, 4]})
    assert seen["video_times"].tolist() == [[0, 1000, 4000]]


def test_parts_that_nothing_reads_are_refused(processor: Any, clip: str) -> None:
    assert ask(processor, {"type": "input_image", "image_url": picture(1)})["pixel_values"].shape[0] == 1
    for part, told in [
        ({"type": "vidoe", "path": clip}, "content part 'vidoe' is not supported"),
        ({"type": "audio", "path": clip}, "content part 'audio' is not supported"),
        ({"type": "video", "path": clip, "begin": 1}, "has 'begin', which nothing reads"),
        ({"type": "video", "video": {"path": clip, "begin": 1}}, "has 'begin', which nothing reads"),
        ({"type": "video", "video": {"path": clip, "start": 1}, "start": 1}, "start is told twice"),
        ({"type": "video", "path": clip, "fps": 2}, "the video tells its own times .10 frames a second"),
        ({"type": "video", "path": clip, "start": "1"}, "start is '1', expected a number"),
        ({"type": "video", "frames": [picture(1)] * 3, "seconds": [3, 2, 1]}, "none before the one before it"),
    ]:
        with pytest.raises(DataError, match=told):
            ask(processor, part)
    for part in ({"type": "image"}, {"type": "video"}):
        with pytest.raises(AlignmentError, match="holds nothing; give it under"):
            ask(processor, part)
    with pytest.raises(ConfigError, match="the conversation is empty"):
        processor.apply_chat_template([], tokenize=True)
    assert "<video>" in processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}, QUESTION]}])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"num_frames": 2}, "num_frames: which frames of a video are seen is part of the model"),
        ({"fps": 1}, "fps: which frames"),
        ({"videos_kwargs": {"num_frames": 2}}, "num_frames: which frames"),
        ({"do_sample_frames": False}, "do_sample_frames=False"),
        ({"do_normalize": False}, "do_normalize=False: how pixels are made"),
        ({"size": {"height": 16, "width": 16}}, "size="),
        ({"images_kwargs": {"do_resize": False}}, "do_resize=False"),
        ({"data_format": "channels_last"}, "data_format='channels_last'"),
        ({"audio": np.zeros(4)}, "audio: no model here hears"),
        ({"experts": ["detail"]}, "experts: this model routes nothing"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(processor: Any, setting: dict[str, Any], told: str) -> None:
    call = {"text": "<image>?", "images": picture(1), "return_tensors": "pt"}
    with pytest.raises(ConfigError, match=told):
        processor(**call, **setting)
    same = processor(**call, do_normalize=True, do_sample_frames=True, data_format="channels_first")
    assert torch.equal(same["pixel_values"], processor(**call)["pixel_values"])


def test_what_contradicts_itself_is_refused(processor: Any) -> None:
    for make, told in [
        (lambda: Video("a.mp4", play="backward"), "play is 'backward'"),  # pyright: ignore[reportArgumentType]
        (lambda: Video("a.mp4", frames=(1,), start=2.0), "by number and by start or end"),
        (lambda: Video({"path": "a.mp4", "frames": ["b.png"]}), "has frames and path, expected one"),
        (lambda: scene(picture(1)), "takes a list of pictures, and was given Image"),  # pyright: ignore[reportArgumentType]
        (lambda: scene(np.zeros((8, 8, 3), np.uint8)), r"given ndarray\(8, 8, 3\)"),  # pyright: ignore[reportArgumentType]
    ]:
        with pytest.raises(DataError, match=told):
            make()
    for spec, told in [
        ({"frames": 8, "max_frames": 4}, "max_frames: 4 changes nothing here"),
        ({"frames": 8, "candidates": 16}, "candidates: 16 changes nothing here"),
        ({"fps": float("inf")}, "finite"),
    ]:
        with pytest.raises(ConfigError, match=told):
            video_spec(spec)
    assert len(scene(picture(k) for k in range(2)).source) == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(AlignmentError, match="text is an empty list"):
        processor(text=[])


def test_text_before_frames_holds_no_token_of_the_chat(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="holds the token '<image>', which is no text"):
        tiny_model(tmp_path, video={"frames": 2, "stamp": "<image>{seconds}"})


def test_relative_files_are_found_whatever_the_format(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, clip: str, processor: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    shutil.copy(clip, tmp_path / "d" / "ä b.mp4")
    said = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "a"}]
    part = [{"role": "user", "content": [{"type": "video", "video": "ä b.mp4"}]}, said[1]]
    rows = {
        "messages": {"videos": ["ä b.mp4"], "messages": said, "m": said, "v": "ä b.mp4"},
        "parts": {"messages": part, "m": part, "v": None},
    }
    for name, row in rows.items():
        (tmp_path / "d" / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        for more in ({"format": "messages"}, {"format": "columns", "columns": {"messages": "m", "video": "v"}}):
            spec = DatasetSpec.model_validate({"name": "d", "path": f"d/{name}.jsonl", **more})
            (sample,) = open_source(spec)
            assert encode_sample(processor, sample).extras["video_times"].shape == (1, 3), (name, more)
