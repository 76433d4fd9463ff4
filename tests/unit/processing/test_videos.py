# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

import base64
import io
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.errors import ConfigError, DataError, MissingFile
from mllm.processing.frames import VideoSpec, choose, in_order, video_spec
from mllm.processing.spread import middles, spread
from mllm.processing.videos import frames_of, named
from mllm.types import Video
from tests.golden.fill import load
from tests.videos import number_of, painted, turned, write_clip, write_gif, write_sound, write_sound_with_cover


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 60)


def seen(source, spec=None, **options):
    """(numbers painted into what is seen, place by place; seconds)"""
    video = source if isinstance(source, Video) else Video(source, **options)
    found = frames_of(video, spec or VideoSpec(frames=5), where="clip")
    shown = {}
    for places, picture in found.pictures():
        shown |= dict.fromkeys(places, number_of(picture))
    return [shown[k] for k in range(len(shown))], found.chosen.seconds, found


def test_uniform_frames_are_those_of_linspace():
    for available in range(1, 200):
        for count in range(1, min(available, 33) + 1):
            assert spread(available, count) == np.linspace(0, available - 1, count, dtype=int).tolist()


def test_middles_are_the_published_ones():

    _, given, wanted = load(Path(__file__).parents[2] / "golden" / "pvc_tiling_and_frames.json")
    for (_, last, count), expected in zip(given["input.video"].tolist(), wanted["output.frames"].tolist(), strict=True):
        assert middles(last + 1, count) == [number for number in expected if number >= 0]


@pytest.mark.parametrize(
    "kind",
    ["h264", "mpeg4 avi", "vp9", "bytes", "data uri", "gif", "folder", "array", "npy", "npy bytes", "tensor", "list"],
)
def test_every_source_shows_the_same_frames(tmp_path, clip, kind):
    import torch

    source, options = clip, {}
    if kind == "mpeg4 avi":
        source = write_clip(tmp_path / "clip.avi", 60, codec="mpeg4")
    elif kind == "vp9":
        source = write_clip(tmp_path / "clip.webm", 60, codec="libvpx-vp9")
    elif kind == "bytes":
        source = clip.read_bytes()
    elif kind == "data uri":
        import base64

        source = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    elif kind == "gif":
        source = write_gif(tmp_path / "clip.gif", 60)
    elif kind != "h264":
        frames, options = np.stack([painted(k) for k in range(60)]), {"fps": 10}
        source = {
            "array": frames,
            "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
            "list": [*map(Image.fromarray, frames)],
        }.get(kind)
        if kind.startswith("npy"):
            source = tmp_path / "frames.npy"
            np.save(source, frames)
            source = source.read_bytes() if kind == "npy bytes" else source
        elif source is None:
            source = tmp_path / "frames"
            source.mkdir()
            for k in range(60):
                Image.fromarray(frames[k]).save(source / f"f{k}.png")  # f10 after f9, not after f1
    numbers, seconds, _ = seen(source, **options)
    assert numbers == [0, 14, 29, 44, 59]
    assert seconds == pytest.approx([0, 1.4, 2.9, 4.4, 5.9], abs=1e-6)
    numbers, seconds, _ = seen(source, VideoSpec(fps=2), **options)
    assert numbers == list(range(0, 60, 5)) and seconds == pytest.approx([k / 2 for k in range(12)], abs=1e-6)


def test_an_array_file_that_is_no_video_is_named(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"clip: an array of shape \(4, 8, 8\) is no video"):
        seen(tmp_path / "flat.npy")
    np.save(tmp_path / "whole.npy", np.zeros((4, 8, 8, 3), np.uint8))
    data = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:-100])
    with pytest.raises(DataError, match=r"clip: '.*cut\.npy' holds no array of frames"):
        seen(tmp_path / "cut.npy")
    with pytest.raises(DataError, match=r"the array of frames is broken .*bytes follow"):
        seen(data[:-100])
    lies = data.replace(b"(4, 8, 8, 3)", b"(9999999, 9999, 9999, 3)")
    with pytest.raises(DataError, match="the array of frames is broken"):
        seen(lies)
    many = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (2_000_001, 1, 1, 3))
    with pytest.raises(DataError, match=r"2,000,001 frames; at most 2,000,000"):
        seen(many)
    with pytest.raises(DataError, match="the video has no frames"):
        seen(many[:0])
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds no array of frames"):
        seen(tmp_path / "objects.npy")


def test_only_what_is_needed_is_decoded(clip):
    numbers, _, found = seen(clip, VideoSpec(frames=2))
    assert numbers == [0, 59]
    assert found.clip.decoded <= 20, "the frames between two key frames, not the whole video"
    numbers, _, found = seen(clip, VideoSpec(which="keyframes", max_frames=3))
    assert len(numbers) == 3 and numbers[0] == 0 and found.clip.decoded <= 12


def test_times_are_the_files_own_where_the_rate_varies(tmp_path):
    times = [0, 40, 80, 1000, 1040, 1080, 3000, 3040]
    path = write_clip(tmp_path / "vfr.mkv", 8, times=times)
    numbers, seconds, _ = seen(path, VideoSpec(frames=8))
    assert numbers == list(range(8)) and seconds == pytest.approx([t / 1000 for t in times], abs=1e-6)
    numbers, _, _ = seen(path, VideoSpec(fps=1))
    assert numbers == [0, 3, 5, 6], "what is on the screen at 0, 1, 2 and 3 seconds"


def test_a_part_of_a_video(clip):
    assert seen(clip, VideoSpec(frames=3), start=2.0, end=4.0)[0] == [20, 30, 40]
    assert seen(clip, VideoSpec(frames=3), frames=(7, 50, 8))[0] == [7, 50, 8]
    with pytest.raises(DataError, match=r"clip: from 9 to 10 s is no part of a video of 5\.9 s"):
        seen(clip, start=9.0, end=10.0)
    with pytest.raises(DataError, match="clip: frame 60 of 60"):
        seen(clip, frames=(3, 60))


def test_controls_show_the_same_frames_in_another_order(clip):
    forward = seen(clip)[0]
    assert seen(clip, play="reversed")[0] == forward[::-1]
    assert seen(clip, play="frozen")[0] == [29] * 5
    shuffled = seen(clip, play="shuffled")[0]
    assert sorted(shuffled) == forward and shuffled != forward and shuffled == seen(clip, play="shuffled")[0]
    assert seen(clip, play="shuffled")[1] == seen(clip)[1], "times stay in their places"
    orders = {tuple(seen(clip, play="shuffled", key=str(k))[0]) for k in range(20)}
    assert len(orders) > 10, "clips whose frames have the same numbers are shuffled each in its own way"
    assert in_order("shuffled", [3, 5], "x") == (5, 3) and in_order("shuffled", [3, 3]) == (3, 3)


@pytest.mark.parametrize("door", ["file", "bytes", "data uri"])
@pytest.mark.parametrize(
    ("matrix", "lay"),
    [
        ((0, 1, -1, 0), np.rot90),  # lies counter-clockwise; shown, it is turned clockwise
        ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
        ((0, -2, 2, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda frame: np.rot90(frame, 2).swapaxes(0, 1)),
        ((0, 0, 0, 0), np.asarray),
    ],
)
def test_a_turned_video_is_set_upright(tmp_path, matrix, lay, door):
    """The file holds the frames as they lie and says how to show them; without obeying, `number_of` fails or finds another number."""
    import av

    lying = tmp_path / "lying.mp4"
    with av.open(str(lying), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = lay(painted(0)).shape[:2]
        stream.pix_fmt = "yuv420p"
        for number in range(6):
            side = np.ascontiguousarray(lay(painted(number)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(side, format="rgb24")))
        container.mux(stream.encode())
    file = turned(lying, tmp_path / "turned.mp4", matrix)
    data = file.read_bytes()
    source = {"file": file, "bytes": data, "data uri": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}[door]
    assert seen(source, VideoSpec(frames=6))[0] == list(range(6))


def test_an_angle_between_quarter_turns_is_named(tmp_path, clip):
    file = turned(clip, tmp_path / "turned.mp4", (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(DataError, match="clip, frame 0: the file says that it is shown turned by 45° clockwise"):
        seen(file)


def test_bad_videos_are_named(tmp_path, clip):
    def told(source, match, spec=None, kind=DataError, **options):
        started = time.monotonic()
        with pytest.raises(kind, match=match):
            found = frames_of(Video(source, **options), spec or VideoSpec(frames=5), where="clip")
            list(found.pictures())
        assert time.monotonic() - started < 5

    data = clip.read_bytes()
    told(tmp_path / "no.mp4", "clip: no such video file", kind=MissingFile)
    told("https://example.com/a.mp4", "clip: 'https://example.com/a.mp4' is remote", kind=MissingFile)
    told(b"not a video at all, whatever it says", "clip: is no video that can be opened")
    told(data[: len(data) // 2], "clip: (is no video that can be opened|.*broken|.*does not decode)")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6,\n{clip}\n#EXT-X-ENDLIST\n")
    told(playlist, "clip: is no video that can be opened")  # it would read whatever files and addresses it names
    told(write_sound(tmp_path / "sound.m4a"), "clip: has no pictures, only audio")
    told(write_sound_with_cover(tmp_path / "record.mp4"), "clip: has no pictures, only audio and a cover")
    at = data.index(b"avc1", data.index(b"stsd"))
    told(data[:at] + b"zzz1" + data[at + 4 :], "clip: nothing here decodes its pictures: their codec is unknown")
    told(clip, "clip: lasts 0 min 06 s, more than max_seconds allows", VideoSpec(frames=2, max_seconds=3))
    told([], "clip: the video has no frames")
    told(np.zeros((0, 8, 8, 3), np.uint8), "clip: the video has no frames")
    told(np.zeros((8, 8, 3), np.uint8), r"clip: an array of shape \(8, 8, 3\) is no video")
    told(np.full((2, 8, 8, 3), np.nan, np.float32), "clip, frame 0: float pixels must lie in")
    told([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "clip, frame 1: is 9 × 8, the first 8 × 8")
    told([Image.new("RGB", (8, 8))] * 3, "nothing says when these frames are; give fps", VideoSpec(fps=1))
    (tmp_path / "empty").mkdir()
    told(tmp_path / "empty", "holds no frames")
    cut = tmp_path / "cut.mkv"
    whole = write_clip(tmp_path / "whole.mkv", 60).read_bytes()
    cut.write_bytes(whole[: int(len(whole) * 0.6)])
    numbers, seconds, _ = seen(cut, VideoSpec(frames=60))  # what is there is read, at its own time; nothing is made up
    assert 10 < len(numbers) < 60 and numbers == [round(second * 10) for second in seconds]


def test_what_a_decoder_makes_up_of_damage_is_never_shown(tmp_path):
    """Bytes changed in the middle of a film: a frame is shown as it was, or the film is refused, but for what no decoder can tell."""
    data, rng, told = write_clip(tmp_path / "whole.mp4", 40).read_bytes(), random.Random(1), []
    for _ in range(25):
        broken = bytearray(data)
        for _ in range(4):
            broken[rng.randrange(64, len(data))] = rng.randrange(256)
        try:
            found = frames_of(Video(bytes(broken)), VideoSpec(frames=10), where="clip")
            list(found.pictures())
        except DataError as error:
            told.append(str(error))
    assert len(told) > 10 and any("is damaged in the file" in line for line in told)


def test_ten_hours_are_refused_at_once(tmp_path):
    path = write_clip(tmp_path / "long.mkv", 3, times=[0, 1000, 36_000_000])
    with pytest.raises(
        DataError, match=r"clip: lasts (10 h 00 min|more), more than max_seconds|clip: lasts more than max_seconds"
    ):
        seen(path)


def test_large_frames_are_scaled_down(clip):
    found = frames_of(Video(clip), VideoSpec(frames=1, max_pixels=1536), where="clip")
    ((_, picture),) = found.pictures()
    assert picture.size == (64, 24)
    with pytest.raises(DataError, match="above the limit"):
        next(frames_of(Video(clip), VideoSpec(frames=1), where="clip", max_pixels=100).pictures())


def test_a_frame_without_duration_in_a_gif(tmp_path):
    path = write_gif(tmp_path / "a.gif", 4, [200, 50, 50, 400])
    assert seen(path, VideoSpec(frames=4))[1] == pytest.approx([0, 0.2, 0.25, 0.3])
    buffer = io.BytesIO()
    Image.fromarray(painted(3)).save(buffer, "PNG")
    assert seen(buffer.getvalue(), VideoSpec(frames=4))[0] == [3]


def test_the_specification_is_strict():
    assert video_spec({"fps": 1}).most == 64 and video_spec({"frames": 8}).most == 8
    for bad, told in [
        ({}, "give either frames"),
        ({"frames": 4, "fps": 1}, "give either frames"),
        ({"fps": 1, "which": "middle"}, "give frames, not fps"),
        ({"frames": 4, "stamp": "{hours}"}, "no text with"),
        ({"frames": 0}, "frames"),
        ({"frames": 4, "which": "keyframes"}, "leave out frames and fps"),
    ]:
        with pytest.raises(ConfigError, match=told):
            video_spec(bad)
    chosen = choose(
        VideoSpec(fps=1, max_frames=3, stamp="{seconds:.1f}s: "), Video("x"), 91, [k / 10 for k in range(91)], where="x"
    )
    assert chosen.numbers == (0, 45, 90) and VideoSpec(fps=1, stamp="{seconds:.1f}s: ").stamps(chosen.milliseconds) == [
        "0.0s: ",
        "4.5s: ",
        "9.0s: ",
    ]


def golden(name):
    meta, given, wanted = load(Path(__file__).parents[2] / "golden" / f"{name}.json")
    return meta, given, wanted


def test_space_aware_frames_are_the_published_ones():
    import torch

    from mllm.processing.space_aware import greedy_cover, space_aware_frames, voxel_sets

    meta, given, wanted = golden("spatialmllm_greedy_coverage")
    for problem, expected in zip(given["input.member"], wanted["output.selected"].tolist(), strict=True):
        sets = [set(np.flatnonzero(row).tolist()) for row in problem]
        assert greedy_cover(sets, meta["ctor"]["K"]) == [number for number in expected if number >= 0]
    meta, given, wanted = golden("spatialmllm_voxel_sets")
    points, mask = (torch.from_numpy(given[f"input.{name}"])[0] for name in ("points", "mask"))
    sets = voxel_sets(points, mask, torch.from_numpy(given["input.origin"]), float(given["input.voxel"][0]))
    assert [len(found) for found in sets] == wanted["output.counts"].tolist()
    assert sorted((frame, *cell) for frame, cells in enumerate(sets) for cell in cells) == [
        tuple(row) for row in wanted["output.voxels"].tolist()
    ]
    assert greedy_cover(sets, meta["ctor"]["K"]) == [n for n in wanted["output.selected"].tolist() if n >= 0]

    points, confidence = torch.rand(4, 6, 6, 3), torch.ones(4, 6, 6)
    points[2] = points[0]  # shows nothing new
    points[1, :3], confidence[3, 0, 0] = float("nan"), float("inf")
    found = space_aware_frames(points, confidence, 4)
    assert found == [0, 1, 3], "broken depth does not count, and a frame that shows nothing new is left out"
    with pytest.raises(DataError, match="no point is a finite number"):
        space_aware_frames(points * float("nan"), confidence, 2)


def test_a_video_that_cannot_be_read_is_named_by_its_file() -> None:
    assert named(Video("clips/a.mp4")) == "video 'clips/a.mp4'"
    assert named(Video("data:video/mp4;base64,AAAA")) == named(Video(b"x")) == "a video"
