"""Clips whose frames carry their own number: which frames did somebody see?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

BITS, CELL = 8, 16
SIZE = (BITS * CELL, 48)
"""(width, height)."""


def painted(number: int) -> np.ndarray:
    """uint8 ``(48, 128, 3)``: eight squares, white for a one of the number in binary, below a white bar; the last third is black."""
    frame = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    frame[:16] = 255
    for bit in range(BITS):
        if number >> bit & 1:
            frame[16:32, bit * CELL : (bit + 1) * CELL] = 255
    return frame


def number_of(picture: Image.Image) -> int:
    """The number painted into a frame. Fails where the picture is not upright."""
    values = np.asarray(picture.convert("L").resize(SIZE), np.float32)
    assert values[4:12].mean() > 200 and values[36:44].mean() < 55, "the frame is not upright"
    return sum(int(values[20:28, bit * CELL + 4 : (bit + 1) * CELL - 4].mean() > 127) << bit for bit in range(BITS))


def write_clip(
    path: Path,
    count: int,
    *,
    fps: int = 10,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    keyframe_every: int = 12,
    b_frames: int = 2,
) -> Path:
    """A video file of ``count`` painted frames. times: milliseconds of each, for a variable frame rate."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        if codec == "libx264":
            stream.options = {"bf": str(b_frames), "preset": "ultrafast", "crf": "10"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound_with_cover(path: Path) -> Path:
    """An MP4 with sound and, as its first stream, a cover."""
    import av
    from av.stream import Disposition

    with av.open(str(path), "w") as container:
        cover, stream = container.add_stream("png", rate=1), container.add_stream("aac", rate=16000)
        cover.width, cover.height, cover.pix_fmt = *SIZE, "rgb24"
        cover.disposition = Disposition.attached_pic.value
        for packet in [*cover.encode(av.VideoFrame.from_ndarray(painted(7), format="rgb24")), *cover.encode()]:
            container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(path: Path, out: Path, matrix: tuple[float, ...] = (0, 1, -1, 0)) -> Path:
    """An MP4 whose track header says how it is shown: turned by a quarter, clockwise, or by any display matrix (a, b, c, d)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    start = at + (40 if data[at] == 0 else 52)
    a, b, c, d = (round(value * 0x10000) for value in matrix)
    for k, value in enumerate((a, b, 0, c, d, 0, 0, 0, 0x40000000)):
        data[start + 4 * k : start + 4 * k + 4] = value.to_bytes(4, "big", signed=True)
    out.write_bytes(data)
    return out


def write_gif(path: Path, count: int, milliseconds: int | list[int] = 100) -> Path:
    pictures = [Image.fromarray(painted(number)) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return path
