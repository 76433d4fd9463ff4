"""What do masks and edits cost on a GPU: masks a second, the head's share of a training step, an edit's latency by its steps?

    python benchmarks/outputs_speed.py --output benchmarks/results/outputs_speed_h200.txt
    python benchmarks/outputs_speed.py --small --device cpu     # tiny sizes, to try the script; its figures say nothing

Random weights made on the device, bf16; FOCUS's model (``recipes/focus.yaml``: Qwen2.5-7B, Qwen2-VL's encoder at 252 pixels, ConvNeXt-L at
768) with its query decoder, and the same with SAM-H at 1024 pixels and SAM's decoder. Masks a second: of the head alone (features and
states given), of encoder and head, and of `model.segment` (32 pictures of 1024 x 768 as PIL, 8 tokens each of an answer that is forced to
hold one [SEG]; pictures are prepared on the CPU). A training step learns the language model, connector and head, encoders frozen, which the
connector reads too: with a mask a row, and the same without any. Edits: the recipe's SDXL denoiser on 512 pixels, float32 weights under
bf16 autocast. Each section is a process with a time limit of its own, forked from one that has imported everything and not touched the GPU:
what it has measured is printed and written at once, and what hangs or fails takes nothing else with it. Where nothing is said for half a
minute, the place in the code is.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SAM = {"preset": "sam-h"}
SMALL_LLM = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
SMALL_EYE = {"type": "hf", "layers": [-1], "architecture": {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8}}  # fmt: skip
WORDS = 200
"""Tokens of text in a training row, beside those of its picture."""


def parts_of(eye: str, small: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Encoders and language model of FOCUS, and the head; eye: the encoder that masks are read from."""
    from mllm.recipe import load_recipe

    if small:
        decoder: dict[str, Any] = {"type": "query", "width": 16, "depth": 1, "heads": 2}
        encoders: dict[str, Any] = {"whole": SMALL_EYE, "local": SMALL_EYE}
        return encoders, SMALL_LLM, {"type": "segmentation", "encoder": "local", "decoder": decoder}
    model: Any = load_recipe("focus").model
    encoders = {name: without_weights(dict(value)) for name, value in model.encoders.items()}
    decoder = {"type": "query", "width": 256, "depth": 2, "heads": 8}
    if eye == "sam":
        encoders["local"], decoder = dict(SAM), {"type": "sam"}
    return encoders, dict(model.language_model.config), {"type": "segmentation", "encoder": "local", "decoder": decoder}


def spec_of(eye: str, small: bool, folder: str) -> Any:
    """FOCUS's model without its tokenizer."""
    from tests.helpers import tiny_spec

    encoders, text, head = parts_of(eye, small)
    connector = {"type": "gated_cross", "query": "whole", "source": "local", "num_heads": 4 if small else 16,
                 "projector": {"depth": 2}}  # fmt: skip
    return tiny_spec(folder, language_model={"config": text, "tokenizer": folder}, encoders=encoders, connector=connector,
                     heads={"marks": head})  # fmt: skip


def build(eye: str, options: argparse.Namespace) -> tuple[Any, Any]:
    from mllm.models.build import build_model
    from tests.helpers import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        spec = spec_of(eye, options.small, folder)
        return build_model(spec, dtype=options.dtype, load_weights=False, device=options.device)


class Report:
    """Lines that are printed, and appended to the file, as they come; seconds are counted from the start of the first process."""

    def __init__(self, options: argparse.Namespace):
        self.options = options

    def say(self, line: str) -> None:
        faulthandler.dump_traceback_later(30, repeat=True)
        print(f"[{time.time() - self.options.began:3.0f} s] {line}", flush=True)

    def add(self, line: str) -> None:
        self.say(line)
        if self.options.output is not None:
            with self.options.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def timed(work: Callable[[], Any], options: argparse.Namespace, repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    spans = []
    for number in range(repeats + 1):
        wait(options)
        start = time.perf_counter()
        work()
        wait(options)
        if number >= 1:
            spans.append(time.perf_counter() - start)
    return median(spans)


def wait(options: argparse.Namespace) -> None:
    import torch

    if options.device.type == "cuda":
        torch.cuda.synchronize()


class Forced:
    """A logits processor whose answers are these tokens."""

    def __init__(self, start: int, tokens: list[int]):
        self.start, self.tokens = start, tokens

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        wanted = self.tokens[ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted], device=scores.device), 0.0)


def heads(eye: str, options: argparse.Namespace, report: Report) -> None:
    """Masks a second of a head, and of its encoder with it."""
    import torch

    from mllm.encoders.catalogue import build_encoder, encoder_config
    from mllm.heads.base import HeadParts
    from mllm.heads.segmentation.head import SegmentationHead, SegmentationHeadConfig

    encoders, text, head_settings = parts_of(eye, options.small)
    report.say(f"{eye}: building encoder and head")
    config: Any = encoder_config({"weights": None, **encoders["local"]}, where="local")
    with options.device:
        encoder: Any = build_encoder(config).to(options.dtype).eval()
        parts = HeadParts(text["hidden_size"], {"local": config.info})
        head = SegmentationHead(SegmentationHeadConfig(**head_settings), parts).to(options.dtype).eval()
    report.say(f"{eye}: built")
    batch, side = options.batch, config.info.image
    pixels = torch.randn(batch, 3, side.height, side.width, device=options.device, dtype=options.dtype)
    owners = torch.arange(batch, device=options.device)
    places = torch.stack([owners, torch.zeros_like(owners)], 1)
    hidden = torch.randn(batch, 1, text["hidden_size"], device=options.device, dtype=options.dtype)
    with torch.no_grad():
        features = encoder(pixels)
        alone = timed(lambda: head.predict(hidden, places, owners, features), options, 20)
        report.add(
            f"{eye:<7} {batch} pictures at {side.height}: head alone {1e3 * alone:.2f} ms, {batch / alone:,.0f} masks/s"
        )
        both = timed(lambda: head.predict(hidden, places, owners, encoder(pixels)), options, options.repeats)
    report.add(f"{eye:<7} encoder and head {1e3 * both:.1f} ms, {batch / both:,.1f} masks/s")


def whole(eye: str, options: argparse.Namespace, report: Report) -> None:
    """The whole model: answers with masks, and the head's share of a training step."""
    import torch
    from PIL import Image

    report.say(f"{eye}: building the whole model")
    model, processor = build(eye, options)
    report.say(f"{eye}: built")
    mark = model.heads["marks"].config.tokens["mark"]
    model.eval()
    pictures = [Image.effect_noise((1024, 768), 60 + k).convert("RGB") for k in range(options.batch)]
    tokens = [65, 66, 67, 68, mark, 69, 70, processor.tokenizer.eos_token_id]
    forced: Any = [Forced(prompt_length(processor, pictures[0]), tokens)]
    answers: list[Any] = []

    def answer() -> None:
        answers[:] = model.segment(
            pictures, "a cup", processor=processor, max_new_tokens=len(tokens), logits_processor=forced
        )

    span = timed(answer, options, 1)
    assert all(len(found) == 1 for found in answers), "every answer should hold one mask"
    report.add(f"{eye:<7} model.segment of {options.batch} pictures {span:.2f} s, {options.batch / span:.1f} masks/s")
    for rows in (options.rows, options.rows // 2, options.rows // 4):
        try:
            training(eye, model, processor, rows, options, report)
            break
        except torch.OutOfMemoryError:
            report.add(f"{eye:<7} no room for a step of {rows} rows")
        gc.collect()
        torch.cuda.empty_cache()


def prompt_length(processor: Any, picture: Any) -> int:
    """Tokens of `segment`'s prompt with its picture."""
    return len(prompt(processor, picture, processor.segments.question.format(phrase="a cup")))


def prompt(processor: Any, picture: Any, question: str) -> torch.Tensor:
    from mllm.processing.chat import render_prompt
    from mllm.processing.layout import expand
    from mllm.types import IMAGE_MARK, Turn

    text = render_prompt(processor, [Turn("user", f"{IMAGE_MARK}\n{question}")])
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    places = (ids == processor.image_token_id).nonzero().flatten().tolist()
    return expand(ids, places, processor.image_layouts([picture], where="picture"))[0]


def training(eye: str, model: Any, processor: Any, rows: int, options: argparse.Namespace, report: Report) -> None:
    """The head's share of a step: one batch with a mask a row, and without any."""
    import torch
    from PIL import Image

    mark = model.heads["marks"].config.tokens["mark"]
    model.train()
    model.model.vision_tower.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=options.device.type == "cuda")
    seen = prompt(processor, Image.new("RGB", (1024, 768)), "a cup")
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(65, 120, (rows, WORDS), generator=generator)
    infos, given = model.config.encoder_infos(), {}
    for name, key in model.model.pixel_keys.items():
        shape = (rows, 3, infos[name].image.height, infos[name].image.width)
        given[key] = torch.zeros(shape, device=options.device, dtype=options.dtype)
    side = infos["local"].image
    targets = torch.zeros(rows, side.height, side.width, dtype=torch.uint8, device=options.device)
    targets[:, : side.height // 3, : side.width // 2] = 1
    spans = {}
    for kind in ("with a mask a row", "words only"):
        said, more = answer.clone(), {}
        if kind != "words only":
            said[:, 10], more = mark, {"target_masks": targets}
        ids = torch.cat([seen.expand(rows, -1), said], 1).to(options.device)
        labels = ids.clone()
        labels[:, : len(seen)] = -100

        def step(ids: Any = ids, labels: Any = labels, more: Any = more) -> None:
            model(input_ids=ids, labels=labels, use_cache=False, skip_logits=True, **given, **more).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        spans[kind] = timed(step, options, options.repeats)
        report.say(f"{eye}: step {kind} {1e3 * spans[kind]:.1f} ms")
    with_it, without = spans.values()
    share = 100 * (with_it - without) / with_it
    report.add(
        f"{eye:<7} step of {rows} rows of {len(seen) + WORDS} tokens: words only {1e3 * without:.1f} ms, with a mask a row "
        f"{1e3 * with_it:.1f} ms: the head is {share:.1f} % of a step"
    )


def edits(options: argparse.Namespace, report: Report) -> None:
    """Edits by steps."""
    import torch

    from mllm.recipe import load_recipe
    from mllm.types import VisualCodes
    from mllm.visual_tokenizers.base import build_tokenizer
    from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
    from mllm.visual_tokenizers.diffusion.edit import edit

    recipe = load_recipe("focus_demo" if options.small else "focus")
    model: Any = recipe.model
    settings = without_weights(model.visual_tokenizer)
    stage = next(stage for stage in recipe.stages if stage.name == "decoder")
    report.say("edits: building the tokenizer")
    with options.device:
        tokenizer = build_tokenizer(settings).eval()
        report.say("edits: building the decoder")
        decoder = DiffusionDecoder(stage.options["decoder"], tokenizer).eval()
    size, side = sum(p.numel() for p in decoder.network.parameters()), decoder.image_side
    report.say(f"edits: built, {size / 1e6:,.0f} M denoiser")
    guided = [] if decoder.config.drop == 0 else [(1, 2.0, options.steps)]
    for batch, guidance, all_steps in ((1, 1.0, options.steps), *guided, (8, 1.0, options.steps[2:3])):
        pixels = torch.zeros(batch, 3, side, side, device=options.device)
        mask = torch.zeros(batch, 1, side, side, device=options.device)
        mask[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1
        codes = VisualCodes({
            name: torch.zeros(batch, rows * columns, tokenizer.codebooks[name][1], dtype=torch.long, device=options.device)
            for name, (rows, columns) in tokenizer.grids.items()
        }, tokenizer.grid)  # fmt: skip
        for steps in all_steps:
            work = partial(edit, decoder, pixels, mask, codes, steps=steps, guidance=guidance)
            with torch.autocast("cuda", torch.bfloat16) if options.device.type == "cuda" else nullcontext():
                span = timed(work, options, 1)
            report.add(
                f"edit of {batch} at {side} pixels, guidance {guidance:g} ({size / 1e6:,.0f} M denoiser), steps {steps}: "
                f"{1e3 * span:.0f} ms"
            )


def without_weights(value: Any) -> Any:
    """Settings with no part read from disk."""
    if isinstance(value, dict):
        return {name: without_weights(part) for name, part in value.items() if name != "weights"}
    return value


HEADS_IMPORT = (
    "torch",
    "timm",
    "transformers.models.sam.modeling_sam",
    "mllm.encoders.catalogue",
    "mllm.heads.segmentation.head",
)
EDITS_IMPORT = ("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
                "mllm.visual_tokenizers.diffusion.edit")  # fmt: skip
WHOLE_IMPORT = ("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2_vl.modeling_qwen2_vl", "mllm.models.build",
                "mllm.models.registration", "tests.helpers")  # fmt: skip
SECTIONS: dict[str, tuple[float, tuple[str, ...], Callable[..., None]]] = {
    "heads_focus": (20, HEADS_IMPORT, partial(heads, "focus")),
    "heads_sam": (20, (), partial(heads, "sam")),
    "edits": (40, EDITS_IMPORT, edits),
    "whole_focus": (35, WHOLE_IMPORT, partial(whole, "focus")),
    "whole_sam": (35, WHOLE_IMPORT, partial(whole, "sam")),
}
"""Name → seconds that it may take, what the first process imports for it, and what it does."""


def section(name: str, options: argparse.Namespace, report: Report) -> None:
    """One section, in a process of its own."""
    import torch

    if options.device == "cuda" and torch.cuda._is_in_bad_fork():
        report.say(f"{name}: an import had opened the GPU; this section imports anew")
        os.execv(
            sys.executable, [sys.executable, __file__, *sys.argv[1:], "--sections", name, "--began", str(options.began)]
        )
    options.device, options.dtype = torch.device(options.device), torch.float32 if options.small else torch.bfloat16
    if name == next(iter(SECTIONS)):
        import transformers

        where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
        report.add(
            f"python benchmarks/outputs_speed.py; {date.today()}, one {where}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}; random weights, {str(options.dtype).removeprefix('torch.')}"
        )
    SECTIONS[name][2](options, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("--rows", type=int, default=16, help="of a training step (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="of encoders and training steps (default: 3)")
    parser.add_argument("--seconds", type=float, default=140, help="in all (default: 140)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 10, 20, 50])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU does not open it
    alone = options.began is not None
    options.began = options.began or time.time()
    report = Report(options)
    if alone:
        section(options.sections[0], options, report)
        return
    if options.output is not None:
        options.output.write_text("", encoding="utf-8")
    report.say(f"sections: {', '.join(options.sections)}")
    imported(options.sections[0], report)
    for name, following in zip(options.sections, [*options.sections[1:], None]):
        limit, began = min(SECTIONS[name][0], options.seconds - (time.time() - options.began)), time.time()
        if limit < 4:
            report.add(f"{name} was left out: the time is up (--seconds {options.seconds:g})")
            continue
        faulthandler.cancel_dump_traceback_later()  # its thread would be missing behind the fork, and waited for
        process = get_context("fork").Process(target=section, args=(name, options, report))
        process.start()
        if following is not None:
            imported(following, report)  # meanwhile
        process.join(max(0.0, limit - (time.time() - began)))
        if process.is_alive():
            process.kill()
            process.join()
            report.add(f"{name} was stopped after {time.time() - began:.0f} s; what it had measured stands above")
        elif process.exitcode != 0:
            report.add(f"{name} failed (exit {process.exitcode}); the reason is printed above")


def imported(name: str, report: Report) -> None:
    """What a section needs, in this process."""
    began = time.time()
    for module in SECTIONS[name][1]:
        import_module(module)
    report.say(f"{name}: imports took {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
