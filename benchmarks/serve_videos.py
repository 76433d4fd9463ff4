"""Is a served clip answered as `generate` answers it, and what does it cost beside the same frames as pictures?

    python benchmarks/serve_videos.py [--prompts 60] [--clips 48] [--checkpoint FOLDER]

One server (`mllm serve`, a tiny checkpoint on a CPU unless one is named), asked over HTTP. ``equal``: prompts with videos, scenes and
pictures among them, each answer's tokens beside `generate`'s. ``speed``: clips of 320 × 240 and 4 s, of which the model sees four frames,
all asked at once: as a video file, as a scene of these four frames, as four pictures; each in several rounds of new clips, then the last
round's requests again (the engine keeps what the encoders made of them). With a model this small nearly all that is measured is what a
request costs beside it: decoding, resizing, hashing, HTTP. CPU time is that of all of the server's processes; other work on the machine
changes it less than the clock. A line of JSON for each; fails where an answer is not `generate`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serve_clients import KEY, WRONG, Reference, tell
from benchmarks.serve_h200 import descendants
from benchmarks.servers import Server, heading, picture_url, question, running, tiny_checkpoint

TOKENS, FRAMES, SIZE, SECONDS, RATE = 12, 4, (320, 240), 4, 10
WAYS = ("video", "scene", "pictures")


def part(kind: str, url: str, **more: Any) -> dict[str, Any]:
    """One part of a message."""
    return {"type": kind, kind: {"url": url}, **more}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def equal(server: Server, checkpoint: str, count: int, work: Path) -> None:
    """Answers to so many prompts over HTTP, beside `generate`."""
    import httpx

    from mllm.types import Video, scene
    from tests.helpers import picture
    from tests.videos import write_clip

    reference = Reference(checkpoint)
    same: dict[str, list[bool]] = {}
    for number in range(count):
        clip = write_clip(work / "equal.mp4", 9 + 3 * number % 50, fps=4 + number % 9)
        film = part("video_url", data_url("video/mp4", clip.read_bytes())), Video(clip.read_bytes())
        alone = part("image_url", picture_url(number)), picture(number)
        size, views = (30 + number % 40, 25 + number % 30), 1 + number % FRAMES
        urls = [picture_url(100 + 4 * number + k, size) for k in range(views)]
        room = [part("image_url", url, scene="room") for url in urls]
        seen = scene([base64.b64decode(url.partition(",")[2]) for url in urls])
        kind = ("a video", "a scene", "a picture and a video", "a scene and a video")[number % 4]
        parts = {
            "a video": [film[0]],
            "a scene": room,
            "a picture and a video": [alone[0], film[0]],
            "a scene and a video": [*room, film[0]],
        }[kind]
        visuals = {
            "a video": [film[1]],
            "a scene": [seen],
            "a picture and a video": [alone[1], film[1]],
            "a scene and a video": [seen, film[1]],
        }[kind]
        text = f"what is it {number}?"
        body = {**question(text, max_tokens=TOKENS, temperature=0), "return_token_ids": True}
        body["messages"][0]["content"] = [*parts, {"type": "text", "text": text}]
        answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=120, headers={"x-api-key": KEY})
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["token_ids"]
        same.setdefault(kind, []).append(found == reference.tokens(text, *visuals))
    told = {kind: f"{sum(right)}/{len(right)}" for kind, right in same.items()}
    tell("equal", {"prompts": count, "as generate": told}, all(map(all, same.values())))


def make_clip(number: int) -> tuple[bytes, list[bytes]]:
    """An H.264 file of moving colours, and the frames of it that a model with four sees, as JPEG."""
    import av

    rng, file = np.random.default_rng(number), io.BytesIO()
    across, down = np.meshgrid(np.linspace(0, 6, SIZE[0]), np.linspace(0, 4, SIZE[1]))
    waves = rng.uniform(0.5, 2.0, (3, 3))
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for t in range(SECONDS * RATE):
            shades = [np.sin(a * across + b * down + c * t / 5) for a, b, c in waves]
            shown = np.stack([127 + 120 * shade for shade in shades], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue(), frames_of(file.getvalue())


def frames_of(data: bytes) -> list[bytes]:
    """Four uniform frames, first to last, as JPEG."""
    import av

    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    found = []
    for place in np.linspace(0, len(frames) - 1, FRAMES).round().astype(int):
        file = io.BytesIO()
        frames[place].save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


def bodies(way: str, clips: list[tuple[bytes, list[bytes]]]) -> list[dict[str, Any]]:
    """A request for each clip, shown in one of `WAYS`."""
    made = []
    for number, (film, frames) in enumerate(clips):
        pictures = [data_url("image/jpeg", frame) for frame in frames]
        body = question(f"what happens in {number}?", max_tokens=4, temperature=0)
        shown = [part("video_url", data_url("video/mp4", film))]
        if way != "video":
            named = {"scene": "film"} if way == "scene" else {}
            shown = [part("image_url", url, **named) for url in pictures]
        body["messages"][0]["content"] = [*shown, {"type": "text", "text": f"what happens in {number}?"}]
        made.append(body)
    return made


async def ask_all(address: str, requests: list[dict[str, Any]]) -> tuple[float, list[float], int]:
    """All at once. Returns the seconds until the last answer, each one's wait, and the tokens of all prompts."""
    import aiohttp

    tokens = 0

    async def ask(client: aiohttp.ClientSession, body: dict[str, Any]) -> float:
        nonlocal tokens
        begun = time.perf_counter()
        async with client.post(f"{address}/v1/chat/completions", json=body) as answer:
            told = await answer.json()
            assert answer.status == 200, told
        tokens += told["usage"]["prompt_tokens"]
        return time.perf_counter() - begun

    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers={"x-api-key": KEY}) as client:
        begun = time.perf_counter()
        waits = await asyncio.gather(*(ask(client, body) for body in requests))
        return time.perf_counter() - begun, sorted(waits), tokens


def cpu_seconds(server: Server) -> float:
    """CPU time of the server and of all below it, so far."""
    total, tick = 0, os.sysconf("SC_CLK_TCK")
    for pid in (server.process.pid, *descendants(server.process.pid)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(words[11]) + int(words[12])
    return total / tick


def speed(server: Server, count: int, rounds: int) -> None:
    """Clips a second, as files, as scenes and as pictures."""
    batches = [[make_clip(1000 * k + number) for number in range(count)] for k in range(rounds + 1)]
    sizes = [(len(film), sum(map(len, frames))) for film, frames in batches[0]]
    mean = [round(sum(one) / count) for one in zip(*sizes, strict=True)]
    tell("sizes", {"bytes of a file": mean[0], "bytes of its four frames as JPEG": mean[1]}, True)
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for clips in batches:  # the ways take turns, so that what else the machine does meets all of them
        for way in WAYS:
            for _ in range(2 if clips is batches[-1] else 1):
                requests, begun = bodies(way, clips), cpu_seconds(server)
                seconds, waits, tokens = asyncio.run(ask_all(server.address, requests))
                used = cpu_seconds(server) - begun
                rows[way].append(
                    {
                        "clips_per_second": round(count / seconds, 2),
                        "cpu_ms_a_clip": round(1000 * used / count, 1),
                        "p50_s": round(waits[count // 2], 2),
                        "prompt_tokens": tokens // count,
                    }
                )
    for way, found in rows.items():
        new = found[1:-1]  # the first round warms up
        told = {key: sorted(one[key] for one in new) for key in ("clips_per_second", "cpu_ms_a_clip", "p50_s")}
        tell(way, {"clips": count, "rounds": len(new), **told, "again": found[-1]}, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4, help="of new clips, the first not counted")
    parser.add_argument("--checkpoint", help="of a model that takes videos of four frames; default: a tiny one")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    print(heading(f"benchmarks/serve_videos.py --prompts {options.prompts} --clips {options.clips}"), flush=True)
    checkpoint = options.checkpoint or tiny_checkpoint("film", work)
    with running(checkpoint, work / "server.log", "--max-videos", "2", MLLM_API_KEY=KEY) as server:
        if options.prompts:
            equal(server, checkpoint, options.prompts, work)
        if options.clips:
            speed(server, options.clips, options.rounds)
    return 1 if WRONG else 0


if __name__ == "__main__":
    raise SystemExit(main())
