"""How fast does vLLM serve two encoders and a 7B, beside its own one-encoder LLaVA-7B? One GPU, random weights, no
downloads.

    python benchmarks/serve_h200.py [--budget 520] [--sections encoders,hf,noise,llava_eager,ours_eager]

128 requests of one 640×480 picture (576 visual tokens) and a short question, 64 new tokens each, all sent at once;
caches off; three passes, best of the last two. ``ours``: CLIP-L/336 + DINOv2-L on channels. A section's name says how:
``eager``, ``graphs``, ``graphs_ungraphed`` (CUDA graphs, but none of the encoders), ``graphs_compiled`` (and the encoders
compiled), ``fp8`` (language model quantised online), ``cached`` (caches on, 8 pictures asked again and again), ``tp2``
(two GPUs share the language model and split the pictures). ``served_…`` is `mllm serve` and HTTP requests with JPEG
pictures in place of vLLM's ``LLM``; there ``dp2`` too (an engine on each of two GPUs behind one address), ``pp2`` (layers on
two GPUs) and ``api4`` (four processes for HTTP and pictures; default: as many as `mllm serve` takes). ``levels``: also the time to the
first token with 1, 8, 32 and 128 clients; ``soak``: also some time with clients that come and go, and the memory before and after it.
``served_llava_…`` is vLLM's own server with its LLaVA. Beside the rate stand the GPU time of the visual parts, the CPU
time of a request's preparation, and a pass of one new token (prefill alone).
``encoders``: our two encoders without vLLM, plain, compiled and in graphs. ``hf``: the same checkpoint through
`generate`, batches of 32, and 16 greedy answers as reference for the bf16 agreement of ``ours_*``: tokens up to the
first difference, the reference's log-probability gap between the two tokens there, and, given the reference's own
tokens as prompt, at how many positions the same token is the likeliest. ``noise``: the latter for the fp32 model.
``profile``: also where the time of a one-token pass goes. ``--small`` runs everything with a tiny model, to try the
script itself.

Every section is a process of its own; one JSON line each, printed as it ends; a section that fails prints its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECTIONS = [
    "encoders", "hf", "noise", "llava_eager", "ours_eager", "ours_graphs_compiled", "llava_graphs", "ours_graphs",
    "ours_cached", "ours_fp8",
]  # fmt: skip
REQUESTS, NEW_TOKENS, CHECKED = 128, 64, 16
STEP_TOKENS = 8192
"""Of a step, in every engine alike: vLLM's own default is 16384 in process and 8192 behind its server, on such a GPU."""
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
DINO = {
    "model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32064, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = {
    "clip": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2},
    "dino": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def shapes(small: bool) -> tuple[dict, dict, dict]:
    """CLIP, DINOv2 and Llama settings."""
    if not small:
        return CLIP, DINO, LLAMA
    return CLIP | SMALL["clip"], DINO | SMALL["dino"], LLAMA | SMALL["llama"]


def questions() -> list[str]:
    return [f"question {index}: what can be seen in this picture, and where is it?" for index in range(REQUESTS)]


def pictures(count: int, seed: int) -> list:
    """Distinct 640×480 pictures, smooth like photographs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480)) for _ in range(count)]


def write_ours(folder: Path, small: bool, device: str, *, weights: bool = True) -> Any:
    """Model with random weights, built on the device, and its processor; written to disk. weights=False: config and
    processor only, for engines that make weights up."""
    import torch

    from mllm.models.build import build_config, build_processor
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.recipe import ModelSpec
    from tests.helpers import tiny_tokenizer

    clip, dino, llama = shapes(small)
    tokenizer = tiny_tokenizer()
    spec = ModelSpec.model_validate(
        {
            "language_model": {"config": {"model_type": "llama", **llama}},
            "encoders": {
                "semantic": {"type": "hf", "architecture": clip, "layers": [-2], "final_norm": False},
                "spatial": {"type": "hf", "architecture": dino, "image_size": 336, "layers": [-1]},
            },
            "connector": {"type": "channel_concat", "projector": {"depth": 2}},
            "chat_template": "chatml",
        }
    )
    config = build_config(spec, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    config.dtype = torch.bfloat16
    processor = build_processor(spec, config, tokenizer)
    processor.image_processor.resampler = "torch"  # as vLLM's LLaVA resizes; PIL costs 7 ms a picture
    processor.save_pretrained(folder)
    if not weights:
        config.architectures = ["MllmForConditionalGeneration"]
        config.save_pretrained(folder)
        return None
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = MllmForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        # Proportions of a trained model. As initialised, 32 layers of a 7B turn bf16's rounding into 15 % of the logits, and
        # chance decides every token; like this it is 3 %, and the picture still decides the answer.
        model.get_input_embeddings().weight.mul_(50.0)
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
        model.lm_head.weight.mul_(2.0)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return model, processor


def write_llava(folder: Path, small: bool) -> None:
    """Config and processor of vLLM's own LLaVA-7B; its weights are made by ``load_format=dummy``."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    from tests.helpers import tiny_tokenizer

    clip, _, llama = shapes(small)
    tokenizer = tiny_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in clip.items() if k != "model_type"}),
        text_config=LlamaConfig(**llama),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def prompt_ids(tokenizer) -> list[list[int]]:
    """The same prompts for every engine, one placeholder each."""
    texts = [f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions()]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def section_hf(work: Path, small: bool) -> dict:
    """Write the checkpoint; `generate` at batch 32; reference tokens and log probabilities."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    model, processor = write_ours(work / "ours", small, device)
    written = time.perf_counter() - started
    ids, images = prompt_ids(processor.tokenizer), pictures(REQUESTS, 0)
    per_image = processor.rules.layout().num_tokens
    image_id = processor.image_token_id

    def inputs(chosen: list[int]) -> dict:
        rows = [[x for t in ids[i] for x in ([t] * per_image if t == image_id else [t])] for i in chosen]
        longest = max(map(len, rows))
        pad = processor.tokenizer.pad_token_id
        pixels = processor.image_processor([images[i] for i in chosen], return_tensors="pt")
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device),
            "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device),
            **{k: v.to(device, torch.bfloat16) for k, v in pixels.items()},
        }

    reference = []
    for index in range(CHECKED):
        output = model.generate(
            **inputs([index]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
            suppress_tokens=[image_id], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, -NEW_TOKENS:].tolist()
        top = [step[0].float().log_softmax(-1).topk(20) for step in output.logits]
        reference.append(
            {"tokens": tokens, "top": [dict(zip(map(str, t.indices.tolist()), t.values.tolist())) for t in top]}
        )
    (work / "reference.json").write_text(json.dumps(reference))
    seconds = []
    size = 32
    for _ in range(2):
        started = time.perf_counter()
        for first in range(0, REQUESTS, size):
            model.generate(
                **inputs(list(range(first, first + size))),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            if small:
                break
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    count = size if small else REQUESTS
    return {
        "written_s": round(written, 1),
        "passes_s": _round(seconds),
        "requests_per_s": round(count / min(seconds), 2),
    }


def section_engine(name: str, work: Path, small: bool) -> dict:
    """One vLLM engine: three passes, where their time goes, and agreement where it is ours."""
    which, *options = name.split("_")
    ours, cached = which == "ours", "cached" in options
    folder = work / which
    if not ours:
        write_llava(folder, small)
    elif not (folder / "config.json").exists():
        write_ours(folder, small, "cpu", weights=False)
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    settings: dict = {"dtype": "bfloat16", "max_model_len": 2048, "gpu_memory_utilization": 0.85, "max_num_seqs": 256}
    settings["max_num_batched_tokens"] = STEP_TOKENS
    if small:
        settings |= {"dtype": "float32", "block_size": 32, "gpu_memory_utilization": 0.1}  # on a CPU: of main memory
    if not ours or not list(folder.glob("*.safetensors")):
        settings["load_format"] = "dummy"
    if not cached:
        settings |= {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    if "fp8" in options:
        settings["quantization"] = "fp8"
    if "tp2" in options:
        settings |= {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
    if "compiled" in options:
        settings["compilation_config"] = {"compile_mm_encoder": True}
    if "ungraphed" in options:
        os.environ["MLLM_ENCODER_GRAPHS"] = "0"
    eager = "graphs" not in options and not ("compiled" in options and small)
    llm = LLM(str(folder), enforce_eager=eager, limit_mm_per_prompt={"image": 1}, seed=0, max_logprobs=20, **settings)
    loaded = time.perf_counter() - started
    preparation = time_preparation()
    from benchmarks import serve_h200 as importable  # the worker cannot unpickle what is defined in __main__

    llm.apply_model(importable.watch_visual_parts)
    ids = prompt_ids(llm.get_tokenizer())
    count = 8 if small else REQUESTS
    seconds: dict[int, list[float]] = {NEW_TOKENS: [], 1: []}
    visual: dict = {}
    for number, length in enumerate((NEW_TOKENS, NEW_TOKENS, NEW_TOKENS, 1, 1)):
        images = pictures(8, 0) * (REQUESTS // 8) if cached else pictures(REQUESTS, 10 + number)
        prompts: list[Any] = [
            {"prompt_token_ids": ids[i], "multi_modal_data": {"image": images[i]}} for i in range(count)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        before = llm.apply_model(importable.read_visual_clock)[0]
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds[length].append(time.perf_counter() - started)
        assert all(len(o.outputs[0].token_ids) == length for o in outputs)
        after = llm.apply_model(importable.read_visual_clock)[0]
        if number == 2:
            visual = {
                part: {
                    "images": row["images"] - before[part]["images"],
                    "gpu_ms": round((row["seconds"] - before[part]["seconds"]) * 1000, 1),
                    "calls": row["calls"] - before[part]["calls"],
                }
                for part, row in after.items()
            }
    profile: dict = {}
    if "profile" in options:
        llm.apply_model(importable.start_profile)
        llm.generate(prompts, sampling, use_tqdm=False)  # one token each: where prefill's time goes
        profile = llm.apply_model(importable.stop_profile)[0]
    best = min(seconds[NEW_TOKENS][1:])
    result = {
        "loaded_s": round(loaded, 1),
        "load_format": settings.get("load_format", "auto"),
        "prompt_tokens": len(outputs[0].prompt_token_ids or ()),
        "passes_s": _round(seconds[NEW_TOKENS]),
        "requests_per_s": round(count / best, 2),
        "tokens_per_s": round(count * NEW_TOKENS / best, 1),
        "one_token_passes_s": _round(seconds[1]),
        "slowest_visual_calls_s": llm.apply_model(importable.slowest_visual_calls)[0],
        "visual_parts_of_third_pass": visual,
        "preparation_ms_per_request": round(1000 * sum(preparation) / max(1, len(preparation)), 2),
        **profile,
    }
    if ours and "load_format" not in settings and (work / "reference.json").exists() and not cached:
        try:
            result["agreement"] = agreement(llm, work, ids)
        except Exception as error:  # a result without agreement is still a result
            result["agreement_error"] = f"{type(error).__name__}: {error}"[:500]
    return result


def section_served(name: str, work: Path, small: bool) -> dict:
    """`mllm serve` and 128 clients at once: three passes of requests with pictures in base64, and what the server counted."""
    import asyncio
    import base64
    import io
    import urllib.request

    from mllm.serve.app import start_server
    from mllm.serve.http.admission import STATISTICS

    options = name.split("_")
    theirs = "llava" in options
    folder = work / ("llava" if theirs else "ours")
    if theirs:
        write_llava(folder, small)
    elif not (folder / "config.json").exists():
        write_ours(folder, small, "cpu", weights=False)
    settings = ["--max-model-len", "2048", "--dtype", "float32" if small else "bfloat16"]
    settings += ["--tensor-parallel", "2"] if "tp2" in options else []
    settings += [] if "graphs" in options else ["--enforce-eager" if theirs else "--eager"]
    settings += [] if theirs else ["--"]
    settings += ["--max-num-seqs", "256", "--max-num-batched-tokens", str(STEP_TOKENS)]
    settings += ["--block-size", "32"] if small else []
    settings += (
        ["--gpu-memory-utilization", "0.1" if small else "0.85"] if theirs or not small else []
    )  # a CPU's: main memory
    settings += [] if "cached" in options else ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    settings += ["--data-parallel-size", "2"] if "dp2" in options else []
    settings += ["--pipeline-parallel-size", "2"] if "pp2" in options else []
    if "compiled" in options:
        settings += ["--compilation-config", json.dumps({"compile_mm_encoder": True})]
    if "ungraphed" in options:
        os.environ["MLLM_ENCODER_GRAPHS"] = "0"
    asked = next((option.removeprefix("api") for option in options if option.startswith("api")), None)
    settings += ["--api-server-count", asked] if asked else []
    settings += [] if list(folder.glob("*.safetensors")) else ["--load-format", "dummy"]
    count = 8 if small else REQUESTS
    started = time.perf_counter()
    start = start_vllms_own if theirs else start_server
    server, address = start(str(folder), settings, timeout=1200 if small else 400)
    try:
        loaded = time.perf_counter() - started
        texts = questions()

        def body(index: int, image) -> bytes:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": texts[index]}]
            message = {"role": "user", "content": content}
            asked = {
                "model": "ours",
                "messages": [message],
                "max_tokens": NEW_TOKENS,
                "ignore_eos": True,
                "temperature": 0,
            }
            return json.dumps(
                asked
            ).encode()  # before the clock starts: what the client does is none of the server's time

        async def ask(client, request: bytes) -> tuple[float, str, int]:
            sent = time.perf_counter()
            kind = {"Content-Type": "application/json"}
            async with client.post(f"{address}/v1/chat/completions", data=request, headers=kind) as answer:
                answer.raise_for_status()
                found = await answer.json()
            return (
                time.perf_counter() - sent,
                found["choices"][0]["message"]["content"],
                found["usage"]["completion_tokens"],
            )

        async def passes() -> tuple[list[float], list[float], list[list[str]]]:
            import aiohttp

            seconds, waits, answers = [], [], []
            # vLLM's server closes a connection that is idle for 5 s, about what the next pass's pictures take to make here
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as client:
                for number in range(4):  # the last pass asks what the one before asked
                    images = pictures(count, 10 + min(number, 2))
                    requests = [body(index, images[index]) for index in range(count)]
                    begun = time.perf_counter()
                    rows = await asyncio.gather(*(ask(client, request) for request in requests))
                    seconds.append(time.perf_counter() - begun)
                    assert all(tokens == NEW_TOKENS for _, _, tokens in rows)
                    waits = sorted(wait for wait, _, _ in rows)
                    answers.append([text for _, text, _ in rows])
            return seconds, waits, answers

        seconds, waits, answers = asyncio.run(passes())
        more = under_load(address, server.pid, options, small)
        lines = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode().splitlines()
        return {
            "loaded_s": round(loaded, 1),
            "passes_s": _round(seconds),
            "requests_per_s": round(count / min(seconds[1:]), 2),
            "latency_s": {"p50": round(waits[len(waits) // 2], 3), "p95": round(waits[int(len(waits) * 0.95)], 3)},
            "same answers in the last two passes": sum(a == b for a, b in zip(*answers[-2:], strict=True)),
            "of": count,
            "finished": [x for x in lines if x.startswith("vllm:request_success_total") and 'reason="length"' in x],
            "visual_parts": None
            if theirs
            else json.loads(urllib.request.urlopen(address + STATISTICS, timeout=10).read()),
            **more,
        }
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)  # what is left then ends with this section's processes


def under_load(address: str, pid: int, options: list[str], small: bool) -> dict:
    """Levels of clients for some seconds each, and a soak: what `mllm bench serve` measures, every request with a picture of its
    own. pid: the server's process, for its memory."""
    from mllm.serve.load import Load, run_load

    found: dict = {}
    if "levels" in options:
        levels, load = ([1, 2], Load(seconds=2)) if small else ([1, 8, 32, 128], Load(seconds=8))
        measured = run_load(address, levels, load, pid=pid)["levels"]
        kept = ("answered", "failed", "requests_per_second", "first_token_ms", "latency_ms", "errors")
        found["levels"] = {str(level["clients"]): {name: level[name] for name in kept} for level in measured}
    if "soak" in options:
        load = Load(seconds=3 if small else 45, sides=(200, 1200), leaving=0.1, seed=1)
        found["soak"] = run_load(address, [2 if small else 32], load, pid=pid)["levels"][0]
        found["soak"]["gpu_memory_mib"] = gpu_memory()
    return found


def gpu_memory() -> list[int] | None:
    """MiB that are taken on every GPU; None without one."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return [int(line) for line in told.stdout.split()]


def start_vllms_own(folder: str, settings: list[str], timeout: float) -> tuple[subprocess.Popen, str]:
    """vLLM's own server, without anything of ours, on a free loopback port."""
    import urllib.request

    from tests.helpers import free_port

    port, deadline = free_port(), time.monotonic() + timeout
    template = Path(folder) / "chat.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    command = [sys.executable, "-m", "mllm.serve.vllm.command", "serve", folder, "--port", str(port), *settings]
    command += ["--served-model-name", "ours", "--chat-template", str(template)]
    command += ["--chat-template-content-format", "openai", "--limit-mm-per-prompt", '{"image": 1}']
    process = subprocess.Popen(command, stdout=sys.stderr)
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return process, f"http://127.0.0.1:{port}"
        time.sleep(1)
    raise RuntimeError(f"vLLM's own server was not ready (status {process.poll()})")


def time_preparation() -> list[float]:
    """Seconds of every call of vLLM's image processing in this process, as they are taken."""
    from vllm.multimodal.processing import BaseMultiModalProcessor

    taken: list[float] = []
    inner = BaseMultiModalProcessor.apply

    def timed(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return inner(self, *args, **kwargs)
        finally:
            taken.append(time.perf_counter() - started)

    BaseMultiModalProcessor.apply = timed  # type: ignore[method-assign]
    return taken


def watch_visual_parts(model) -> None:
    """In vLLM's worker: measure encoders and connector with the clock that `mllm serve` has."""
    from mllm.serve.http.stats import EncoderClock

    clock = EncoderClock()
    parts = dict(getattr(model.vision_tower, "encoders", {"encoder": model.vision_tower}))
    calls = dict.fromkeys([*parts, "connector"], 0)
    for name, module in [*parts.items(), ("connector", model.multi_modal_projector)]:
        clock.watch(name, module)
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    model._measured = (clock, calls)
    model._took = took = []
    inner = model.embed_multimodal

    def timed(**kwargs):  # on the CPU: without waiting for the GPU, so what is long is preparation or compilation
        started = time.perf_counter()
        try:
            return inner(**kwargs)
        finally:
            took.append(round(time.perf_counter() - started, 3))

    model.embed_multimodal = timed


def slowest_visual_calls(model) -> list[float]:
    """The CPU's seconds in the slowest calls of the visual part."""
    return sorted(model._took, reverse=True)[:4]


def read_visual_clock(model) -> dict:
    """Part → images, seconds and calls so far."""
    clock, calls = model._measured
    return {name: {**row, "calls": calls[name]} for name, row in clock.read().items()}


def agreement(llm, work: Path, ids: list[list[int]]) -> dict:
    """Greedy tokens against the reference, alone and in a batch."""
    from vllm import SamplingParams

    reference = json.loads((work / "reference.json").read_text())
    image_id = next(
        t for t in ids[0] if ids[0].count(t) == 1 and llm.get_tokenizer().convert_ids_to_tokens(t) == "<image>"
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=20,
        logit_bias={image_id: -100.0},
    )
    images = pictures(REQUESTS, 0)
    prompts: list[Any] = [
        {"prompt_token_ids": ids[i], "multi_modal_data": {"image": images[i]}} for i in range(len(reference))
    ]
    found = {}
    for mode in ("alone", "batch"):
        groups = [[p] for p in prompts] if mode == "alone" else [prompts]
        outputs = [o for group in groups for o in llm.generate(group, sampling, use_tqdm=False)]
        agreed, gaps, first_gaps = 0, [], []
        for known, output in zip(reference, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            first = next((i for i, (a, b) in enumerate(zip(known["tokens"], tokens)) if a != b), NEW_TOKENS)
            agreed += first
            for step in range(first):
                theirs, mine = known["top"][step], output.outputs[0].logprobs[step]
                gaps += [abs(theirs[str(t)] - e.logprob) for t, e in mine.items() if str(t) in theirs]
            if first < NEW_TOKENS:
                theirs = known["top"][first]
                first_gaps.append(
                    theirs[str(known["tokens"][first])] - theirs.get(str(tokens[first]), min(theirs.values()))
                )
        found[mode] = {
            "prompts": len(reference),
            "identical": sum(
                list(o.outputs[0].token_ids) == k["tokens"] for k, o in zip(reference, outputs, strict=True)
            ),
            "share_of_tokens_before_first_difference": round(agreed / (len(reference) * NEW_TOKENS), 4),
            "largest_logprob_gap_before": round(max(gaps, default=0.0), 4),
            "reference_gap_at_first_difference": {
                "max": round(max(first_gaps, default=0.0), 4),
                "all": _round(first_gaps),
            },
        }
    forced: list[Any] = [
        {"prompt_token_ids": ids[i] + row["tokens"][:-1], "multi_modal_data": {"image": images[i]}}
        for i, row in enumerate(reference)
    ]
    outputs = llm.generate(forced, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20), use_tqdm=False)
    rows = []
    for output in outputs:
        steps = (output.prompt_logprobs or [])[-(NEW_TOKENS - 1) :]
        rows.append([{t: e.logprob for t, e in step.items() if t != image_id} for step in steps])
    found["given the reference's tokens"] = forced_agreement(
        [known["tokens"][: NEW_TOKENS - 1] for known in reference], [known["top"] for known in reference], rows
    )
    return found


def forced_agreement(tokens: list[list[int]], top: list[list[dict]], found: list[list[dict[int, float]]]) -> dict:
    """At how many positions the likeliest token is the reference's, and how far log probabilities lie apart."""
    equal, total, gaps, lost = 0, 0, [], []
    for row_tokens, row_top, row_found in zip(tokens, top, found, strict=True):
        for token, known, mine in zip(row_tokens, row_top, row_found, strict=False):  # the last token is no prompt
            best = max(mine, key=mine.__getitem__)
            total += 1
            equal += best == token
            if best != token:
                lost.append(known[str(token)] - known.get(str(best), min(known.values())))
            gaps += [abs(known[str(t)] - value) for t, value in mine.items() if str(t) in known and value > -1e4]
    return {
        "positions": total,
        "same_likeliest_token": round(equal / max(1, total), 4),
        "mean_logprob_difference_of_top_20": round(sum(gaps) / max(1, len(gaps)), 4),
        "largest": round(max(gaps, default=0.0), 4),
        "reference_gap_where_they_differ": {
            "median": round(sorted(lost)[len(lost) // 2], 4) if lost else 0.0,
            "max": round(max(lost, default=0.0), 4),
        },
    }


def start_profile(model) -> None:
    """In vLLM's worker: record what the engine's thread and the GPU do."""
    from torch.profiler import ProfilerActivity, profile

    model._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    model._profile.start()


def stop_profile(model) -> dict:
    """Seconds in which the GPU was busy, its idle stretches with what the CPU did in them, and the costliest CPU calls."""
    recorded = model._profile
    recorded.stop()
    events = recorded.profiler.kineto_results.events()
    spans = sorted((e.start_ns(), e.end_ns()) for e in events if "CUDA" in str(e.device_type()))
    calls = [(e.start_ns(), e.end_ns(), e.name()) for e in events if "CPU" in str(e.device_type())]
    busy, gaps, reached = 0, [], spans[0][0] if spans else 0
    for start, end in spans:
        if start > reached:
            gaps.append((start - reached, reached, start))
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    gaps.sort(reverse=True)
    shown = []
    for length, start, end in gaps[:12]:
        inside: dict[str, float] = {}
        for first, last, name in calls:
            overlap = min(last, end) - max(first, start)
            if overlap > 0.1 * length:
                inside[name] = inside.get(name, 0.0) + overlap / 1e6
        most = sorted(inside.items(), key=lambda item: -item[1])[:5]
        shown.append({"ms": round(length / 1e6, 2), "cpu": [f"{name[:60]} {ms:.1f}" for name, ms in most]})
    totals: dict[str, list[float]] = {}
    for first, last, name in calls:
        row = totals.setdefault(name, [0, 0.0])
        row[0] += 1
        row[1] += (last - first) / 1e6
    costly = sorted(totals.items(), key=lambda item: -item[1][1])[:25]
    return {
        "gpu_busy_ms": round(busy / 1e6, 1),
        "gpu_span_ms": round((spans[-1][1] - spans[0][0]) / 1e6, 1) if spans else 0.0,
        "gpu_gaps_over_1_ms": {
            "count": sum(g[0] > 1e6 for g in gaps),
            "ms": round(sum(g[0] for g in gaps if g[0] > 1e6) / 1e6, 1),
            "longest": shown,
        },
        "cpu_calls_ms": {name[:70]: [int(count), round(ms, 1)] for name, (count, ms) in costly},
    }


def section_noise(work: Path, small: bool) -> dict:
    """How far bf16 itself is from fp32 on this checkpoint: the same reference prompts through the fp32 model."""
    import torch
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    processor = AutoProcessor.from_pretrained(work / "ours")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MllmForConditionalGeneration.from_pretrained(work / "ours", dtype=torch.float32).to(device).eval()
    reference = json.loads((work / "reference.json").read_text())
    ids, images = prompt_ids(processor.tokenizer), pictures(CHECKED, 0)
    found = []
    for index, row in enumerate(reference):
        prompt = [
            x
            for t in ids[index]
            for x in ([t] * processor.rules.layout().num_tokens if t == processor.image_token_id else [t])
        ]
        pixels = {k: v.to(device) for k, v in processor.image_processor([images[index]], return_tensors="pt").items()}
        tokens = torch.tensor([prompt + row["tokens"][:-1]], device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens, **pixels, logits_to_keep=NEW_TOKENS).logits[0].float().log_softmax(-1)
        logits[:, processor.image_token_id] = -float("inf")
        best = logits.topk(20)
        found.append([dict(zip(i, v)) for i, v in zip(best.indices.tolist(), best.values.tolist())])
    result = forced_agreement([row["tokens"] for row in reference], [row["top"] for row in reference], found)
    return {"fp32 given the bf16 reference's tokens": result, "picture decides": _sensitivity(model, processor, ids)}


def _sensitivity(model, processor, ids: list[list[int]]) -> dict:
    """Share of 8 prompts whose first greedy token another picture changes; and a picture changed for one encoder only."""
    import torch

    images, others = pictures(8, 0), pictures(8, 99)
    device = model.device

    def first(index: int, pixels: dict) -> int:
        prompt = [
            x
            for t in ids[index]
            for x in ([t] * processor.rules.layout().num_tokens if t == processor.image_token_id else [t])
        ]
        tokens = torch.tensor([prompt], device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens, **{k: v.to(device) for k, v in pixels.items()}, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    changed: dict[str, int] = {}
    for index in range(8):
        own, other = (
            processor.image_processor([source[index]], return_tensors="pt").data for source in (images, others)
        )
        base = first(index, own)
        for key in [*own, "all"]:
            mixed = other if key == "all" else {**own, key: other[key]}
            changed[key] = changed.get(key, 0) + (first(index, mixed) != base)
    return {"of": 8, **changed}


def section_encoders(work: Path, small: bool) -> dict:
    """Our two encoders without vLLM: images per second plain, compiled and in graphs, and how far their features differ."""
    import copy

    import torch

    from mllm.models.pipeline import EncoderBank
    from mllm.serve.vllm.encoder_graphs import EncoderGraphs, compile_encoders

    clip, dino, _ = shapes(small)
    configs = {
        "semantic": {"type": "hf", "architecture": clip, "layers": [-2], "final_norm": False},
        "spatial": {"type": "hf", "architecture": dino, "image_size": 336, "layers": [-1]},
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    bank = EncoderBank(configs)
    for encoder in bank.encoders.values():
        encoder.to_empty(device=device)
        encoder.restore_buffers()  # type: ignore[operator]
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    bank = bank.to(device, torch.bfloat16).eval()
    batches = (1, 5, 12) if small else (1, 5, 12, 32)
    pixels = {n: torch.randn(batches[-1], 3, 336, 336, device=device, dtype=torch.bfloat16) for n in configs}
    reference = {}
    result: dict = {}
    with torch.inference_mode():
        for mode in ("plain", "graphs", "compiled", "compiled_graphs"):
            started = time.perf_counter()
            current = bank if mode == "plain" else copy.deepcopy(bank)
            encoders = dict(current.encoders)
            if mode.startswith("compiled"):
                compile_encoders(encoders)
            if mode.endswith("graphs") and device == "cuda":
                EncoderGraphs(encoders, 32).install()
            row: dict = {}
            for count in batches:
                part = {n: p[:count] for n, p in pixels.items()}
                features, _ = current(part)
                tokens = {n: f.tokens.float() for n, f in features.items()}
                if mode == "plain":
                    reference[count] = tokens
                error = max(
                    float((tokens[n] - reference[count][n]).norm() / reference[count][n].norm()) for n in tokens
                )
                row[f"batch {count}"] = {"relative_error": round(error, 6)} | _rate(current, part, count, device)
            result[mode] = {"ready_after_s": round(time.perf_counter() - started, 1), **row}
            if device == "cuda":
                result[mode]["allocated_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    return result


def _rate(bank, pixels: dict, count: int, device: str) -> dict:
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        bank(pixels)
    wait()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            bank(pixels)
        wait()
        times.append((time.perf_counter() - started) / 4)
    return {"ms": round(min(times) * 1000, 2), "images_per_s": round(count / min(times), 1)}


def _round(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def register_plugin(work: Path) -> None:
    """Let vLLM find our entry point without an installation: package metadata beside the sources, on PYTHONPATH."""
    info = work / "site" / "mllm-0.1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mllm\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmllm = mllm.serve.vllm.plugin:register\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds; sections that would begin later are left out"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/serve_h200"))
    parser.add_argument("--out", type=Path, default=None, help="also write the results here")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.inner:
        try:
            engine = section_served if arguments.inner.startswith("served") else section_engine
            own = {"encoders": section_encoders, "hf": section_hf, "noise": section_noise}
            run = own.get(arguments.inner, partial(engine, arguments.inner))
            result = run(arguments.work, arguments.small)
        except BaseException:
            result = {"error": traceback.format_exc()[-3000:]}
        print("RESULT " + json.dumps(result), flush=True)
        return
    register_plugin(arguments.work)
    paths = [str(arguments.work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this file run in the worker
        **(
            {} if find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        ),  # vLLM does not look whether it is there
        **os.environ,
        "PYTHONPATH": ":".join(p for p in paths if p),
    }
    started = time.perf_counter()
    results: dict[str, dict] = {}
    for name in arguments.sections.split(","):
        left = arguments.budget - (time.perf_counter() - started)
        if left < 30:
            results[name] = {"error": "left out: no time left"}
        else:
            command = [sys.executable, __file__, "--inner", name, "--work", str(arguments.work)]
            command += ["--small"] if arguments.small else []
            results[name] = run_section(command, environment, left, arguments.work / f"{name}.log")
        results[name]["at_s"] = round(time.perf_counter() - started, 1)
        print(f"RESULT {name} {json.dumps(results[name])}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))
    rates = {name: r.get("requests_per_s") for name, r in results.items()}
    ratios = {}
    for name, mine in rates.items():
        theirs = rates.get("llava_eager" if name.endswith("eager") else "llava_graphs")
        if name.startswith("ours_") and mine and theirs:
            ratios[f"{name}_over_llava"] = round(mine / theirs, 3)
        if name.startswith("ours_") and mine and rates.get("hf"):
            ratios[f"{name}_over_hf_batch32"] = round(mine / rates["hf"], 2)
    print("SUMMARY " + json.dumps({"requests_per_s": rates, **ratios}), flush=True)


def descendants(pid: int) -> list[int]:
    """Processes below one, by Linux's list of children."""
    found, waiting = [], [pid]
    while waiting:
        try:
            text = Path(f"/proc/{(one := waiting.pop())}/task/{one}/children").read_text()
        except OSError:
            continue
        waiting += (children := [int(word) for word in text.split()])
        found += children
    return found


def run_section(command: list[str], environment: dict, limit: float, log: Path) -> dict:
    """Run one section; its result, or why there is none, with the end of its log."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True
        )
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            text = None
        started = descendants(
            process.pid
        )  # `mllm serve` gives vLLM a session of its own, which the group does not reach
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # a server or engine that is left would hold the GPU's memory
        for one in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, 9)
        if text is None:
            process.communicate()
            return {"error": f"stopped after {limit:.0f} s", "log": log.read_text(errors="replace")[-1500:]}
    with log.open("a") as out:
        out.write(text)  # vLLM logs to both
    line = next((x for x in text.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        return {
            "error": f"ended with {process.returncode}",
            "log": (text[-1000:] + log.read_text(errors="replace"))[-3000:],
        }
    result = json.loads(line.removeprefix("RESULT "))
    if "error" in result:
        result["log"] = log.read_text(errors="replace")[-2000:]
    return result


if __name__ == "__main__":
    main()
