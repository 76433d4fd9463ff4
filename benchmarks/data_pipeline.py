"""How many samples per second does one CPU core prepare, beside transformers' LLaVA processor?

A sample is a 640 × 480 JPEG (about 100 kB) with one question and answer. Ours: decode, pixels of two encoders (CLIP 336
with LLaVA's padding, SigLIP 384), chat template, tokens and labels. transformers: its LLaVA processor on the decoded
picture (CLIP 336, tokens; no labels), and with its SigLIP image processor called beside it for the second encoder.

    python benchmarks/data_pipeline.py [--samples 60] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.processing.chat import encode_sample
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.images import load_image, to_pixels_multi
from mllm.processing.processor import MllmProcessor
from mllm.processing.template import read_template
from mllm.types import IMAGE_MARK, ImageSpec, Sample, Turn, ViewLayout

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPECS = {
    "clip": ImageSpec(height=336, width=336, mean=CLIP_MEAN, std=CLIP_STD, resize="letterbox"),
    "siglip": ImageSpec(height=384, width=384),
}
QUESTION = "What is shown in this picture? Describe the objects and how they lie, in one sentence."
ANSWER = "Two grey cats sleep on a red sofa beside a remote control, one of them on its back." * 2


def photographs(count: int) -> list[bytes]:
    """JPEGs with the size and the detail of photographs."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (31, 41, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.normal(0, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "jpeg", quality=90)
        files.append(buffer.getvalue())
    return files


def tokenizer() -> Any:
    """A byte-level BPE of 2000 tokens; both sides use the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([QUESTION, ANSWER, *(f"number {i} of the words" for i in range(500))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )


def rate(work: Callable[[bytes], Any], files: list[bytes], repeats: int) -> tuple[float, float, float]:
    """(median, lowest, highest) samples per second of CPU time."""
    work(files[0])
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        for data in files:
            work(data)
        rates.append(len(files) / (time.process_time() - start))
    return float(np.median(rates)), min(rates), max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    import transformers
    from transformers import LlavaImageProcessor, LlavaProcessor, SiglipImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    files = photographs(arguments.samples)
    shared = tokenizer()
    layout = ViewLayout(num_tokens=576, grid=(24, 24))
    processor = MllmProcessor(
        MllmImageProcessor(encoders=SPECS, layout=layout), shared, chat_template=read_template("chatml")
    )

    turns = [Turn("user", f"{IMAGE_MARK}\n{QUESTION}"), Turn("assistant", ANSWER)]
    fast = MllmProcessor(
        MllmImageProcessor(encoders=SPECS, layout=layout, resampler="torch"),
        shared,
        chat_template=read_template("chatml"),
    )

    def ours(data: bytes) -> Any:
        return encode_sample(processor, Sample("s", turns, [data]))

    def ours_torch(data: bytes) -> Any:
        return encode_sample(fast, Sample("s", turns, [data]))

    def pixels(**options: Any) -> Callable[[bytes], Any]:
        return lambda data: to_pixels_multi(load_image(data, where="s"), SPECS, **options)

    def llava(image_processor: Any, second: Any = None) -> Callable[[bytes], Any]:
        theirs: Any = LlavaProcessor(
            image_processor=image_processor(do_pad=True, size={"height": 336, "width": 336}, do_center_crop=False),
            tokenizer=shared,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=read_template("chatml"),
        )
        text = processor.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER}],
            tokenize=False,
        ).replace("< image>", "<image>")
        siglip: Any = second(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC) if second else None

        def work(data: bytes) -> Any:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            inputs = theirs(images=image, text=text, return_tensors="pt")
            return inputs, siglip(image, return_tensors="pt") if siglip else None

        return work

    cases: dict[str, Callable[[bytes], Any]] = {
        "decode only (PIL)": lambda data: load_image(data, where="s"),
        "two encoders' pixels, PIL, float32": pixels(),
        "two encoders' pixels, torch, float32": pixels(resampler="torch"),
        "mllm (PIL): two encoders, tokens, labels": ours,
        "mllm (torch): two encoders, tokens, labels": ours_torch,
        "transformers LLaVA (PIL): one encoder, tokens": llava(LlavaImageProcessorPil),
        "transformers LLaVA + SigLIP (PIL): two encoders, tokens": llava(
            LlavaImageProcessorPil, SiglipImageProcessorPil
        ),
        "transformers LLaVA (torchvision): one encoder, tokens": llava(LlavaImageProcessor),
        "transformers LLaVA + SigLIP (torchvision): two encoders, tokens": llava(
            LlavaImageProcessor, SiglipImageProcessor
        ),
    }
    print(f"torch {torch.__version__} · transformers {transformers.__version__} · one core, CPU time")
    print(
        f"{len(files)} JPEGs of {np.mean([len(f) for f in files]) / 1000:.0f} kB, median of {arguments.repeats} (range)"
    )
    figures = {}
    for name, work in cases.items():
        median, low, high = rate(work, files, arguments.repeats)
        figures[name] = {"median": round(median, 1), "low": round(low, 1), "high": round(high, 1)}
        print(f"{median:8.1f} samples/s  ({low:.1f} to {high:.1f})  {name}")
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
