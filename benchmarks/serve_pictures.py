"""How many pictures a second does one process for HTTP prepare, and which step takes the time? A CPU is enough; no engine runs.

    python benchmarks/serve_pictures.py [--requests 64] [--side 480-640]

Every request goes the way of `mllm serve` from its bytes to those for the engine, with the processor of CLIP-L/336 + DINOv2-L (only
sizes and normalisation matter here; the models behind are tiny): admission, vLLM's reading of the address, vLLM's processor, vLLM's
serialisation. Prints milliseconds of CPU per request and step, bytes for the engine, and requests a second of one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLIP = {"type": "hf", "architecture": {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 336, "patch_size": 14,
}}  # fmt: skip
DINO = {"type": "hf", "architecture": {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 336,
    "patch_size": 14,
}}  # fmt: skip


def requests(count: int, side: tuple[int, int]) -> list[bytes]:
    """Bodies of chat requests with a JPEG each."""
    from mllm.serve.load import make_pictures, renamed

    pool, rng, made = make_pictures(16, side, 0), random.Random(0), []
    for number in range(count):
        picture = base64.b64encode(renamed(pool[number % len(pool)], rng)).decode()
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}]
        parts.append({"type": "text", "text": f"What is in picture {number}?"})
        made.append(json.dumps({"messages": [{"role": "user", "content": parts}]}).encode())
    return made


def measure(folder: str, bodies: list[bytes]) -> dict[str, Any]:
    """Milliseconds of a request by step."""
    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.media import MediaConnector
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext
    from vllm.v1.serial_utils import MsgpackEncoder

    from mllm.serve.http.admission import Admission, AdmissionSettings
    from mllm.serve.http.keys import Keys
    from mllm.serve.http.reading import read_json, write_json

    admission = Admission(None, AdmissionSettings(), Keys([]))
    processor = MULTIMODAL_REGISTRY.create_processor(ModelConfig(folder, dtype="bfloat16", max_model_len=4096))
    connector, encoder, ours = MediaConnector(), MsgpackEncoder(), AutoProcessor.from_pretrained(folder)
    ids = ours.tokenizer("<|im_start|>user\n<image>\nWhat?<|im_end|>\n", add_special_tokens=False)["input_ids"]
    spent: dict[str, float] = defaultdict(float)
    sent = 0

    async def admit(body: bytes) -> str:
        data = await admission.admit("/v1/chat/completions", read_json([(b"content-type", b"application/json")], body))
        handed = json.loads(write_json(data))
        return handed["messages"][0]["content"][0]["image_url"]["url"]

    for number, body in enumerate([*bodies[:4], *bodies]):
        if number == 4:  # warmed up
            spent.clear()
            sent, started = 0, time.perf_counter()
        steps = [time.process_time()]
        address = asyncio.run(admit(body))
        steps.append(time.process_time())
        picture = connector.fetch_image(address)
        steps.append(time.process_time())
        items = processor.info.parse_mm_data({"image": [picture]})
        made: Any = processor.apply(ProcessorInputs(list(ids), items), TimingContext(enabled=False))
        steps.append(time.process_time())
        sent += sum(len(memoryview(part)) for part in encoder.encode(made["mm_kwargs"]))
        steps.append(time.process_time())
        for name, begin, end in zip(("admission", "decode", "processor", "serialise"), steps, steps[1:]):
            spent[name] += (end - begin) * 1000
    seconds, count = time.perf_counter() - started, len(bodies)
    per = {f"{name}_ms": round(value / count, 2) for name, value in spent.items()}
    total = sum(spent.values()) / count
    rate = {
        "cpu_ms": round(total, 2),
        "per_second_of_cpu": round(1000 / total, 1),
        "per_second_here": round(count / seconds, 1),
    }
    return {**per, **rate, "bytes_for_the_engine": sent // count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--side", default="480-640", help="pixels of a side, from-to")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    import vllm

    from mllm.serve.vllm.plugin import register
    from tests.helpers import TINY_LLM, tiny_model

    register()
    low, _, high = arguments.side.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        text = {"config": {**TINY_LLM, "max_position_embeddings": 4096}, "tokenizer": f"{folder}/tokenizer"}
        model, processor = tiny_model(f"{folder}/tokenizer", encoders={"clip": CLIP, "dino": DINO}, language_model=text)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        result = measure(folder, requests(arguments.requests, (int(low), int(high or low))))
    print(f"# {time.strftime('%Y-%m-%d')} · vLLM {vllm.__version__} · {os.cpu_count()} cores · side {arguments.side}")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
