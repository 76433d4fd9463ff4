"""What do videos cost before the language model: clips decoded a second and core, and a geometry encoder's memory against frames?

    python benchmarks/video_cost.py                       # one CPU core, under two minutes

Decoding: files of 720p, H.264, 10 s at 30 frames a second, of which 16 or 32 frames are taken, made into the pixels of two encoders.
Memory: peak resident memory of a process that encodes a scene, whole or in parts (`chunk`), less that of one that encodes one view.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FRAMES = (16, 64, 256)
CHUNK, SIDE = 16, 112
ENCODER = {
    "type": "vggt",
    "width": 128,
    "depth": 4,
    "num_heads": 4,
    "patch_embed": "conv",
    "image_size": SIDE,
    "layers": [-1],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("decoding", "memory"))
    parser.add_argument("--clips", type=int, default=3)
    options = parser.parse_args()
    if options.only != "memory":
        decoding(options.clips)
    if options.only != "decoding":
        memory()
    return 0


def write_film(path: Path, seed: int) -> None:
    """Ten seconds of moving gradients at 720p."""
    import av
    import numpy as np

    rng = np.random.default_rng(seed)
    ramps = (np.add.outer(np.arange(720), np.arange(1280))[..., None] + rng.integers(0, 255, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for number in range(300):
            frame = av.VideoFrame.from_ndarray(ramps + np.uint8(5 * number % 256), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decoding(count: int) -> None:
    """Clips a second on one core, from the file to the pixels."""
    from mllm.processing.image_processor import MllmImageProcessor
    from mllm.types import ImageSpec, Video, ViewLayout

    encoders = {
        "semantic": ImageSpec(height=336, width=336),
        "geometry": ImageSpec(height=336, width=336, std=(0.2, 0.2, 0.2)),
    }
    view = ViewLayout(num_tokens=576, grid=(24, 24))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.mp4" for number in range(count)]
        for number, path in enumerate(files):
            write_film(path, number)
        for frames in (16, 32):
            processor = MllmImageProcessor(encoders, layout=view, video={"frames": frames})
            clips = [Video(str(path)) for path in files]
            started = time.process_time()
            for clip in clips:
                list(processor._seen(clip, "clip").pictures())
            decoded = time.process_time()
            for clip in clips:
                processor.preprocess([clip])
            ended = time.process_time()
            told = f"{frames} frames of a 10 s clip of 1280 × 720 (H.264): {count / (decoded - started):.2f} clips/s and core decoded"
            print(f"{told}, {count / (ended - decoded):.2f} made into the pixels of two encoders at 336", flush=True)


def memory() -> None:
    """What a scene of so many frames adds to the peak of a process that encodes one."""
    import torch

    from mllm.encoders.catalogue import build_encoder, encoder_config

    torch.manual_seed(0)
    torch.set_num_threads(1)  # a child of this process has no other threads
    ways = {chunk: {**ENCODER, **({"chunk": chunk} if chunk else {})} for chunk in (0, CHUNK)}
    encoders = {chunk: build_encoder(encoder_config(way, where="encoder")).eval() for chunk, way in ways.items()}

    def encode(frames: int, chunk: int) -> None:
        with torch.inference_mode():
            encoders[chunk](torch.zeros(frames, 3, SIDE, SIDE), scene_ids=torch.zeros(frames, dtype=torch.long))

    base = peak(partial(encode, 1, 0))
    for frames in FRAMES:
        pixels = frames * 3 * SIDE**2 * 4 / 2**20
        features = frames * (SIDE // 14) ** 2 * 2 * 128 * 4 / 2**20
        whole, parts = (peak(partial(encode, frames, chunk)) - base for chunk in (0, CHUNK))
        held = f"pixels {pixels:.0f}, features {features:.0f}"
        print(
            f"{frames:3d} frames of {SIDE} px: whole {whole:5d} MB, in parts of {CHUNK} {parts:5d} MB ({held})",
            flush=True,
        )


def peak(work: Callable[[], None]) -> int:
    """Peak resident memory in MB of a child of this process that does the work."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return int(file.read())


if __name__ == "__main__":
    raise SystemExit(main())
