"""Which videos does a server take, and in what form do they go to the engine?"""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.eval.generators.openai import OpenAIGenerator
from mllm.processing.engine_videos import VIDEO_ID, engine_options, pack, unpack, visual_inputs
from mllm.processing.frames import VideoSpec
from mllm.processing.videos import frames_of
from mllm.serve.vllm.videos import FileLoader, mark_videos, packed
from mllm.types import IMAGE_MARK, Request, Turn, Video, scene
from tests.helpers import picture, tiny_tokenizer
from tests.unit.serve.test_admission import Echo, ask, chat, encoded
from tests.unit.serve.test_admission import picture as image_part

TAKES = {"max_videos": 2, "max_seconds": 60.0}


def film(frames: int = 3, seconds: float = 0.2) -> bytes:
    """An animated file."""
    pictures = [picture(number) for number in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=int(seconds * 1000))
    return file.getvalue()


def part(data: bytes | None = None, kind: str = "video/webm") -> dict:
    url = f"data:{kind};base64,{base64.b64encode(film() if data is None else data).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


@pytest.mark.parametrize(
    "video",
    [
        Video(film(), start=0.1, end=0.5),
        Video(film(), frames=(2, 0), play="reversed", key="k"),
        Video(np.arange(48, dtype=np.uint8).reshape(2, 4, 2, 3), fps=2.5),
        Video({"frames": [picture(1), picture(2)], "fps": 3}),
        scene([film(1), film(1)], [0.5, 4]),
    ],
    ids=["part of a file", "chosen frames", "array", "pictures", "scene"],
)
def test_a_video_comes_out_as_it_went_in(video):
    array = pack(video)
    assert array.dtype == np.uint8 and array.ndim == 4 and packed(array, None) is array
    found = unpack(array)
    assert (found.start, found.end, found.frames, found.play, found.key, found.seconds) == (
        video.start,
        video.end,
        video.frames,
        video.play,
        video.key,
        video.seconds,
    )
    if isinstance(found.source, (bytes, list)):
        assert found.source == video.source
    elif isinstance(video.source, list):
        assert np.array_equal(found.source, np.stack([np.asarray(picture(n)) for n in (1, 2)])) and found.fps == 3
    else:
        assert np.array_equal(found.source, video.source) and found.fps == 2.5


def test_what_an_answer_depends_on_is_in_the_array_that_names_the_cache():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    same = [
        Video(film()),
        Video(film(), start=0.1),
        Video(film(), play="reversed"),
        Video(film(), play="shuffled", key="a"),
    ]
    arrays = [pack(video).tobytes() for video in same]
    arrays += [packed(frames, {"fps": fps}).tobytes() for fps in (1.0, 2.0)]
    assert len(set(arrays)) == len(arrays)
    assert FileLoader.load_bytes(film())[0].tobytes() == arrays[0]


def test_a_folder_of_frames_travels_whole(tmp_path):
    for number in (1, 2, 10):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    frames = np.asarray(unpack(pack(Video(str(tmp_path)))).source)
    assert frames[:, 0, 0, 0].tolist() == [1, 2, 10]


def test_a_models_video_section_opens_the_engine_for_videos():
    class Config:
        video = None

    assert engine_options(Config, images=3, videos=2) == {"limit_mm_per_prompt": {"image": 3}}
    Config.video = {"frames": 4}
    assert engine_options(Config, images=3, videos=2)["limit_mm_per_prompt"] == {"image": 3, "video": 2}
    assert set(engine_options(Config)) == {"media_io_kwargs"}, "as many as the context holds"


def test_a_videos_place_is_marked_where_its_text_stands():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    write = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    text = "a<video> b <image>\n<video>"
    marked = mark_videos(tokenizer, write(text), "<image>", image)
    assert marked == [
        *write("a"),
        VIDEO_ID,
        *write(" b "),
        image,
        *write("\n"),
        VIDEO_ID,
    ]
    assert mark_videos(tokenizer, marked, "<image>", image) == marked
    assert mark_videos(tokenizer, write("no <image> film"), "<image>", image) == write("no <image> film")
    cut = write("<video>")
    odd = [*tokenizer.convert_tokens_to_ids(list("<video>"))] if len(cut) < 7 else [*write("<vid"), *write("eo>")]
    if odd != cut:
        with pytest.raises(ConfigError, match="cannot be found"):
            mark_videos(tokenizer, odd, "<image>", image)


def reader(**spec) -> SimpleNamespace:
    """What a prompt's visuals are told from, of a processor."""
    return SimpleNamespace(image_token_id=7, rules=SimpleNamespace(video=VideoSpec(**spec)))


def test_pictures_and_videos_of_a_prompt_are_told_apart_by_their_order():
    clip = Video(film())
    made = visual_inputs([1, 7, 2, 7, 7], [clip, picture(1), clip], reader(frames=2), where="row")
    assert made["prompt_token_ids"] == [1, VIDEO_ID, 2, 7, VIDEO_ID]
    assert len(made["multi_modal_data"]["video"]) == 2 and len(made["multi_modal_data"]["image"]) == 1
    assert set(visual_inputs([7], [picture(1)], reader(frames=2), where="row")) == {"multi_modal_data"}


@pytest.mark.parametrize("play", ["forward", "reversed", "shuffled", "frozen", "gray"])
@pytest.mark.parametrize("kind", ["file", "folder", "array", "pictures", "bounds", "points"])
def test_an_engine_and_a_server_see_of_a_video_what_the_model_itself_sees(tmp_path, kind, play):
    painted = np.full((12, 8, 8, 3), 20, np.uint8)
    painted[:, :, :, 0] += np.arange(12, dtype=np.uint8)[:, None, None] * 20
    for number, frame in enumerate(painted):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "room.npy", painted)
    (tmp_path / "clip.gif").write_bytes(film(6))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "room.npy.points.npz", points=rng.normal(size=(12, 4, 4, 3)).astype(np.float32))
    spec = VideoSpec(**({"which": "space_aware", "frames": 4, "candidates": 12} if kind == "points" else {"frames": 5}))
    video = {
        "file": lambda: Video(tmp_path / "clip.gif", play=play, key="k"),
        "folder": lambda: Video(tmp_path, fps=3, play=play, key="k"),
        "array": lambda: Video(painted, fps=2, play=play, key="k"),
        "pictures": lambda: Video([Image.fromarray(frame) for frame in painted], play=play, key="k"),
        "bounds": lambda: Video(tmp_path, fps=3, start=1, end=3, play=play, key="k"),
        "points": lambda: Video(tmp_path / "room.npy", play=play, key="k"),
    }[kind]()

    def seen(one: Video) -> tuple:
        found = frames_of(one, spec, where="clip")
        places = {place: np.asarray(picture) for places, picture in found.pictures() for place in places}
        return found.chosen.milliseconds if found.chosen.seconds else None, [places[k].tolist() for k in sorted(places)]

    array = visual_inputs([7], [video], reader(**spec.model_dump()), where="row")["multi_modal_data"]["video"][0]
    assert seen(unpack(array)) == seen(video)
    assert array.nbytes < 3000 or kind == "file", "of a folder the frames that are seen travel alone"

    settings = TAKES | {"max_frames": spec.most, "whole": kind == "points", "video": spec.model_dump()}
    generator, app = OpenAIGenerator("m", "http://127.0.0.1:9/v1"), Echo()
    generator.info = ask(app, path="/mllm/info", method="GET", **settings).json()  # a property: asked once
    assert generator.takes_video
    body = generator._body(Request("r", [Turn("user", f"{IMAGE_MARK}\nwhat?")], [video]))
    reply = ask(app, body, **settings)
    assert reply.status_code == 200, reply.text
    film_part, words = app.bodies[-1]["messages"][0]["content"]
    assert (film_part["type"], words["text"]) == ("video_url", "what?")
    content = base64.b64decode(film_part["video_url"]["url"].partition(",")[2])
    assert seen(unpack(FileLoader.load_bytes(content)[0])) == seen(video)
    assert (content == film(6)) == ((kind, play) == ("file", "forward")), (
        "frames travel where the file does not tell them"
    )


def test_frames_of_two_sizes_are_named_before_the_engine():
    with pytest.raises(DataError, match="clip, frame 1: is 5 × 4, the first 4 × 4"):
        pack(Video([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]), where="clip")
    with pytest.raises(DataError, match="clip: the video has no frames"):
        pack(Video([]), where="clip")


def test_a_model_without_video_refuses_the_part_by_name():
    response = ask(Echo(), chat(part()))
    assert response.status_code == 400 and "'video_url': this server takes text and image_url" in response.text


def test_videos_pass_with_a_cache_name_of_the_servers_own():
    app = Echo()
    assert (
        ask(app, chat(image_part(), part(), part(film(2)), {"type": "text", "text": "what?"}), **TAKES).status_code
        == 200
    )
    picture_part, first, second, _ = app.raw[0]["messages"][0]["content"]
    assert first["video_url"]["url"].startswith("data:video/mp4;base64,"), "vLLM reads video/jpeg by rules of its own"
    assert len({picture_part["uuid"], first["uuid"], second["uuid"]}) == 3
    untyped = {"video_url": part()["video_url"]}
    assert ask(app, chat(untyped), **TAKES).status_code == 200
    assert app.raw[1]["messages"][0]["content"][0]["type"] == "video_url"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([part(), part(), part()], "3 videos in one request; at most 2"),
        ([part(b"no video at all")], "is no video that can be opened"),
        ([part(b"")], "video 0"),
        ([part(film(4, seconds=30.0))], "max_seconds"),
        ([part(film()[:60])], "video 0"),
        ([{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}], "file: addresses are not served"),
        ([{"type": "video_url", "video_url": {"url": "http://inner/a.mp4"}}], "fetches no addresses"),
        ([{"type": "video_url", "video_url": None}], "a video without an address"),
        ([{**part(), "uuid": "x"}], "uuid is not accepted"),
        ([{**part(), "fps": 3}], "not a field"),
    ],
    ids=["many", "damaged", "empty", "long", "cut", "file", "address", "null", "uuid", "field"],
)
def test_other_videos_are_refused_before_the_engine(parts, words):
    app = Echo()
    response = ask(app, chat(*parts), **TAKES)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
    assert app.bodies == [] and len(response.text) < 500


def test_pictures_and_videos_are_counted_apart():
    assert ask(Echo(), chat(*[image_part(encoded())] * 2, part()), max_images=2, **TAKES).status_code == 200
    assert ask(Echo(), chat(*[image_part(encoded())] * 3, part()), max_images=2, **TAKES).status_code == 400


def test_places_that_are_not_found_among_the_tokens_are_told():
    tokenizer = tiny_tokenizer()
    with pytest.raises(AlignmentError, match="2 places of pictures and videos in the text and 0 among its tokens"):
        mark_videos(tokenizer, tokenizer("<video> <image>", add_special_tokens=False)["input_ids"], "<image>", 10**6)


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size=size).save(buffer, "PNG")
    return buffer.getvalue()


def view(seed: int = 1, name: object = "room", size: tuple[int, int] = (40, 30), **more: object) -> dict:
    image = image_part(f"data:image/png;base64,{base64.b64encode(photo(seed, size)).decode()}")
    return {**image, "scene": name, **more}


SCENES = {**TAKES, "max_images": 4, "max_frames": 3}


def test_pictures_of_a_scene_go_on_as_one_video_of_which_all_are_seen():
    app = Echo()
    words = {"type": "text", "text": "which is nearer?"}
    asked = chat(image_part(), view(1), view(2), view(3), words, view(4, "hall"), view(5, "hall"))
    assert ask(app, asked, **SCENES).status_code == 200
    parts = app.raw[0]["messages"][0]["content"]
    assert [one["type"] for one in parts] == ["image_url", "video_url", "text", "video_url"]
    assert len({one["uuid"] for one in parts if "uuid" in one}) == 3
    for one, seeds in ((parts[1], (1, 2, 3)), (parts[3], (4, 5))):
        data = base64.b64decode(one["video_url"]["url"].removeprefix("data:video/mp4;base64,"))
        found = unpack(FileLoader.load_bytes(data)[0])
        assert found.source == [photo(seed) for seed in seeds], "as they came, not decoded"
        assert found.frames == tuple(range(len(seeds))) and found.play == "forward"
        assert np.array_equal(FileLoader.load_bytes(data)[0], pack(scene(found.source)))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([view(1), view(2, size=(50, 30))], "picture 1 is 50 × 30 pixels, the first of its scene 40 × 30"),
        ([view(n) for n in range(4)], "a scene of 4 pictures; this model sees at most 3 of one"),
        ([view(1), image_part(), view(2)], "scene 'room': its pictures must stand side by side in one message"),
        ([view(1), {"type": "text", "text": "and"}, view(2)], "side by side"),
        ([view(1), view(2, "b"), view(3, "c")], "3 videos and scenes in one request; at most 2"),
        ([view(1, name="")], "scene must be a text"),
        ([{**view(1), "scene": 3}], "scene must be a text"),
        ([view(1), {**view(2), "image_url": None}], "a picture without an address"),
        ([view(1), {**view(2), "image_url": {"url": "data:image/png;base64,AAAA"}}], "picture 1"),
        ([{**part(), "scene": "room"}], "'scene' is not a field"),
    ],
)
def test_scenes_that_cannot_be_seen_whole_are_refused(parts, words):
    app = Echo()
    response = ask(app, chat(*parts), **SCENES)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
    assert app.bodies == []


def test_a_scene_says_when_its_pictures_were_taken_and_is_named_by_it():
    app = Echo()
    for times in ((0, 1.5), (0, 2.5)):
        assert ask(app, chat(*(view(seed, seconds=at) for seed, at in enumerate(times))), **SCENES).status_code == 200
    sent = [body["messages"][0]["content"][0] for body in app.raw]
    found = [
        unpack(FileLoader.load_bytes(base64.b64decode(one["video_url"]["url"].partition(",")[2]))[0]) for one in sent
    ]
    assert [video.seconds for video in found] == [(0.0, 1.5), (0.0, 2.5)]
    assert sent[0]["uuid"] != sent[1]["uuid"], "one answer hangs on the times, and so does the cache's name"


@pytest.mark.parametrize(
    ("parts", "words", "timed"),
    [
        ([view(1), view(2)], "picture 0 is without seconds: this model is told when each picture was taken", True),
        ([view(1, seconds=0), view(2)], "picture 1 is without seconds: others of its scene say it", False),
        ([view(1, seconds=2), view(2, seconds=1)], "none may be before the one before it", False),
        ([view(1, seconds=0), view(2, seconds=61)], "its scene lasts 61 s, and this server reads 60 s", False),
        ([view(1, seconds=True)], "in seconds from 0 on", False),
        ([view(1, seconds=-1)], "in seconds from 0 on", False),
        ([view(1, seconds="3")], "in seconds from 0 on", False),
        ([{**image_part(), "seconds": 1}], "'seconds' is not a field", False),
    ],
)
def test_seconds_that_cannot_be_are_refused(parts, words, timed):
    app = Echo()
    response = ask(app, chat(*parts), **SCENES, timed=timed)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
    assert app.bodies == []


def test_a_video_whose_frames_nothing_chooses_is_refused_before_the_engine():
    app = Echo()
    assert ask(app, chat(part(film(3))), **SCENES, whole=True).status_code == 200
    response = ask(app, chat(part(film(4))), **SCENES, whole=True)
    assert response.status_code == 400 and "has 4 frames, and this model chooses among them" in response.text
    assert len(app.bodies) == 1 and ask(app, chat(part(film(4))), **SCENES).status_code == 200


def test_a_model_without_video_says_that_it_sees_pictures_one_by_one():
    response = ask(Echo(), chat(view(1), view(2)))
    assert response.status_code == 400 and "sees pictures one by one; leave scene out" in response.text
