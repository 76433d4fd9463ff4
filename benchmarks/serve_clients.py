"""Do the clients that people have get their answers from a live server: the SDKs of OpenAI and Anthropic, batch files, a load test?

    python benchmarks/serve_clients.py [--work FOLDER] [--sections chat,timed,draw]

``chat``: a tiny checkpoint that takes pictures, videos and scenes. Every way of asking about the same picture must give the text that
`generate` gives; a video and a scene the tokens of `generate`; `mllm batch` answers a file with a bad line and goes on where it stopped;
`mllm bench serve` measures. ``timed``: videos and scenes of a model whose stamp tells the seconds of every frame.
``draw``: a checkpoint that draws; `images.generate` with what OpenAI's SDK knows gives the pictures of
`generate_images`, and what would change them is refused. A line of JSON for each; fails where one is not as it must be.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.servers import ROOT, Server, heading, picture_url, question, running, tiny_checkpoint

KEY, TOKENS, TEXT = "a-key-of-this-run", 12, "what is it?"
WRONG: list[str] = []


def tell(name: str, found: Any, right: bool) -> None:
    print(f"RESULT {name} {json.dumps(found)}{'' if right else '   WRONG'}", flush=True)
    if not right:
        WRONG.append(name)


class Reference:
    """What transformers' `generate` answers."""

    def __init__(self, checkpoint: str):
        from transformers import AutoProcessor

        from mllm.models.modeling_mllm import MllmForConditionalGeneration

        self.model = MllmForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    def tokens(self, text: str, *visuals: Any) -> list[int]:
        from mllm.serve import parity
        from mllm.types import IMAGE_MARK, Turn

        case = parity.Case("asked", [Turn("user", IMAGE_MARK * len(visuals) + "\n" + text)], list(visuals))
        return parity.trace_generate(self.model, self.processor, [case], num_tokens=TOKENS)[0].token_ids

    def text(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def chat_clients(server: Server, reference: Reference) -> None:
    """The same question about the same picture through every SDK and route."""
    import anthropic
    import openai

    from tests.helpers import picture

    url = picture_url(3)
    wanted = reference.tokens(TEXT, picture(3))
    text = reference.text(wanted)
    body = question(TEXT, url, max_tokens=TOKENS, temperature=0)
    messages: Any = body["messages"]
    given = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)
    answers: dict[str, Any] = {}
    answers["openai chat"] = client.chat.completions.create(**given).choices[0].message.content
    stream = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    answers["openai chat, stream"] = "".join(e.choices[0].delta.content or "" for e in stream if e.choices)
    limit = {name: value for name, value in given.items() if name != "max_tokens"}
    answers["openai chat, max_completion_tokens"] = (
        client.chat.completions.create(**limit, max_completion_tokens=TOKENS).choices[0].message.content
    )
    parts: Any = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": TEXT}]
    told = client.responses.create(
        model="tiny", input=[{"role": "user", "content": parts}], max_output_tokens=TOKENS, temperature=0, store=False,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    answers["openai responses"] = told.output_text
    source: Any = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    asked: Any = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": TEXT}]}]
    claude = anthropic.Anthropic(base_url=server.address, api_key=KEY, max_retries=0)  # it sends x-api-key
    found = claude.messages.create(model="tiny", max_tokens=TOKENS, messages=asked)
    answers["anthropic messages"] = "".join(block.text for block in found.content if block.type == "text")
    with claude.messages.stream(model="tiny", max_tokens=TOKENS, messages=asked) as events:
        answers["anthropic messages, stream"] = "".join(events.text_stream)
    # /v1/messages knows no ignore_eos: an answer may end earlier
    right = {
        name: answer == text if "anthropic" not in name else bool(answer) and text.startswith(answer)
        for name, answer in answers.items()
    }
    tell("chat", {"generate says": text, "the same": right}, all(right.values()))
    counted = claude.messages.count_tokens(model="tiny", messages=asked).input_tokens
    tell(
        "count_tokens",
        {"count_tokens": counted, "usage": found.usage.input_tokens},
        counted == found.usage.input_tokens,
    )
    refused = {}
    for name, ask in {
        "openai, wrong key": lambda: openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0).models.list(),
        "anthropic, wrong key": lambda: anthropic.Anthropic(base_url=server.address, api_key="x", max_retries=0).messages.create(
            model="tiny", max_tokens=1, messages=asked),
        "openai, another model": lambda: client.chat.completions.create(**{**given, "model": "other"}),
        "openai, best of beams": lambda: client.chat.completions.create(**{**given, "extra_body": {"use_beam_search": True}}),
    }.items():  # fmt: skip
        try:
            ask()
            refused[name] = "answered"
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            refused[name] = type(error).__name__
    expected = ["AuthenticationError", "AuthenticationError", "NotFoundError", "BadRequestError"]
    tell("refused", refused, list(refused.values()) == expected)


def moving_pictures(server: Server, reference: Reference, work: Path, seconds: tuple[float, ...] | None = None) -> None:
    """A video and a scene, beside `generate`. seconds: when the pictures of the scene were taken."""
    from mllm.types import Video, scene
    from tests.helpers import picture
    from tests.videos import write_clip

    clip = write_clip(work / "clip.mp4", 21)
    data = base64.b64encode(clip.read_bytes()).decode()
    files = [base64.b64decode(picture_url(number).partition(",")[2]) for number in range(3)]

    def post(*parts: dict[str, Any]) -> httpx.Response:
        body = {**question(TEXT, max_tokens=TOKENS, temperature=0), "return_token_ids": True}
        body["messages"][0]["content"] = [*parts, {"type": "text", "text": TEXT}]
        return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=120, headers={"x-api-key": KEY})

    def ask(*parts: dict[str, Any]) -> list[int]:
        answer = post(*parts)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    film = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    untimed = [{"type": "image_url", "image_url": {"url": picture_url(number)}, "scene": "room"} for number in range(3)]
    views = [{**view, "seconds": at} for view, at in zip(untimed, seconds)] if seconds else untimed
    alone = {"type": "image_url", "image_url": {"url": picture_url(7)}}
    seen = scene(files, seconds)
    cases: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
        "a video": ([film], [Video(str(clip))]),
        "a picture and a video": ([alone, film], [picture(7), Video(str(clip))]),
        "a scene": (views, [seen]),
        "a scene and a video": ([*views, film], [seen, Video(str(clip))]),
    }
    same = {name: ask(*parts) == reference.tokens(TEXT, *visuals) for name, (parts, visuals) in cases.items()}
    if seconds is None:
        found = {"another order is another scene": ask(*views[::-1]) != ask(*views)}
        tell("videos_and_scenes", {"as generate": same, **found}, all(same.values()) and all(found.values()))
        return
    later = tuple(at + 3.5 for at in seconds)
    moved = ask(*({**view, "seconds": at} for view, at in zip(untimed, later)))
    same["the same scene later"] = moved == reference.tokens(TEXT, scene(files, later))
    refused = post(*untimed)
    words = refused.json()["error"]["message"]
    right = all(same.values()) and moved != ask(*views) and refused.status_code == 400 and "seconds" in words
    tell("timed", {"as generate": same, "later is another answer": moved != ask(*views), "untimed": words}, right)


def commands(server: Server, work: Path) -> None:
    """`mllm batch` and `mllm bench serve` as they are typed."""
    lines = []
    for number in range(24):
        body = question(f"{number}?", picture_url(number), max_tokens=4)
        lines.append({"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    lines[5]["body"] = {**lines[5]["body"], "experts": ["x"]}  # refused
    lines.append(
        {
            "custom_id": "text",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": "a", "max_tokens": 2},
        }
    )
    path, answers = work / "questions.jsonl", work / "answers.jsonl"
    answers.unlink(missing_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mllm.cli.main", *command, "--server", server.address],
            cwd=ROOT, env={**os.environ, "MLLM_API_KEY": KEY}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    first = run("batch", str(path), "-o", str(answers), "--concurrency", "8")
    statuses: dict[str, int] = {}
    for line in answers.read_text().splitlines():
        status = str((json.loads(line)["response"] or {}).get("status_code"))
        statuses[status] = statuses.get(status, 0) + 1
    kept = answers.read_text().splitlines()
    answers.write_text("\n".join(kept[:-4]) + "\n" + kept[-4][: len(kept[-4]) // 2])  # as an interrupted run leaves it
    second = run("batch", str(path), "-o", str(answers))
    names = {
        json.loads(line)["custom_id"]
        for line in answers.read_text().splitlines()
        if line.startswith('{"id"') and line.endswith("}")
    }
    said = [(done.stdout + done.stderr).strip().splitlines()[-1:] for done in (first, second)]
    codes = [first.returncode, second.returncode]
    found = {
        "lines": len(lines),
        "statuses": statuses,
        "exit, then after an interruption": codes,
        "said": said,
        "names": len(names),
    }
    tell("batch", found, statuses == {"200": 24, "400": 1} and len(names) == 25)
    out = work / "load.json"
    done = run(
        "bench", "serve", "--clients", "1,4", "--seconds", "5", "--sides", "64-640", "--leaving", "0.1", "-o", str(out)
    )
    levels = json.loads(out.read_text())["levels"] if out.is_file() else []
    kept_names = ("clients", "answered", "left", "failed", "requests_per_second", "first_token_ms", "latency_ms")
    rows = [{name: level[name] for name in kept_names} for level in levels]
    well = (
        done.returncode == 0
        and len(levels) == 2
        and all(level["failed"] == 0 and level["answered"] for level in levels)
    )
    tell("bench", {"exit": done.returncode, "levels": rows, "said": done.stdout.strip().splitlines()[-4:]}, well)


def drawings(server: Server, checkpoint: str) -> None:
    """OpenAI's images, beside `generate_images`."""
    import openai
    from PIL import Image

    reference = Reference(checkpoint)
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)
    prompt = "Draw a seven, please"
    wanted = reference.model.generate_images(
        [prompt] * 2, processor=reference.processor, cfg_scale=2.5, temperature=0.8, top_k=20, seed=11
    ).pil()
    more = {"cfg_scale": 2.5, "temperature": 0.8, "top_k": 20, "seed": 11}
    sent: list[dict[str, Any]] = [
        {"response_format": "b64_json"}, {}, {"style": "natural"}, {"background": "auto"}, {"background": "opaque"},
        {"moderation": "low"}, {"moderation": "auto"}, {"stream": False}, {"quality": "auto", "output_format": "png", "size": "auto"},
        {"response_format": "b64_json", "style": "natural", "background": "opaque", "moderation": "auto", "stream": False, "user": "me"},
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for options in sent:
        made = client.images.generate(model="tiny", prompt=prompt, n=2, extra_body=more, **options)
        images = [Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))) for one in made.data or []]
        away = [
            int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) for a, b in zip(images, wanted, strict=True)
        ]
        found[json.dumps(options)] = max(away)
    tell("images_generate", {"levels of 255 away from generate_images": found}, max(found.values()) <= 1)
    refused = {}
    for options in ({"style": "vivid"}, {"background": "transparent"}, {"stream": True}, {"response_format": "url"}, {"quality": "hd"},
                    {"output_format": "webp"}, {"n": 9}, {"size": "1792x1024"}):  # fmt: skip
        try:
            client.images.generate(model="tiny", prompt=prompt, **options)  # type: ignore[call-overload]
            refused[json.dumps(options)] = "drawn"
        except openai.BadRequestError as error:
            refused[json.dumps(options)] = str(error.body["message"] if isinstance(error.body, dict) else error)[:90]  # type: ignore[index]
    tell("images_refused", refused, "drawn" not in refused.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "serve_clients")
    parser.add_argument("--sections", default="chat,timed,draw", help="some of them, by comma")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(
        f"{heading('python benchmarks/serve_clients.py')}, openai {version('openai')}, anthropic {version('anthropic')}",
        flush=True,
    )
    sections = arguments.sections.split(",")
    if "chat" in sections:
        checkpoint = tiny_checkpoint("film", arguments.work)
        with running(checkpoint, arguments.work / "chat.log", MLLM_API_KEY=KEY) as server:
            reference = Reference(checkpoint)
            chat_clients(server, reference)
            moving_pictures(server, reference, arguments.work)
            commands(server, arguments.work)
    if "timed" in sections:
        checkpoint = tiny_checkpoint("timed", arguments.work)
        with running(checkpoint, arguments.work / "timed.log", MLLM_API_KEY=KEY) as server:
            moving_pictures(server, Reference(checkpoint), arguments.work, seconds=(0.0, 1.5, 4.0))
    if "draw" in sections:
        checkpoint = tiny_checkpoint("draw", arguments.work)
        with running(checkpoint, arguments.work / "draw.log", "--max-model-len", "256", MLLM_API_KEY=KEY) as server:
            drawings(server, checkpoint)
    sys.exit(bool(WRONG))


if __name__ == "__main__":
    main()
