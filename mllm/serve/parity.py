"""Does a checkpoint say the same in training, in `generate`, with its adapter merged, and in vLLM?"""

from __future__ import annotations

import gc
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mllm.damage import opening
from mllm.encoders.multiview import ViewsEncoder
from mllm.errors import ConfigError, UnavailableError
from mllm.processing.frames import VideoSpec
from mllm.processing.panels import as_panels
from mllm.processing.protocol import Processor
from mllm.serve.adapters import adapter_rank
from mllm.serve.head_parity import answered, compare_heads, head_cases, model_heads, vllm_heads
from mllm.serve.traces import (
    MOST_VIDEOS,
    Case,
    Difference,
    Trace,
    model_inputs,
    open_vllm,
    trace_forward,
    trace_generate,
    trace_vllm,
    vllm_pixels,
)
from mllm.types import IMAGE_MARK, Turn, Video, scene

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

ALONE = ", each frame alone"
"""Behind an encoder's name: what moves a logit is that it sees each frame of a clip alone."""
_FRAMES = 8
"""Of a clip, at most."""


def standard_cases(
    count: int = 12,
    *,
    max_images: int = 5,
    experts: Sequence[str] = (),
    video: VideoSpec | None = None,
    points: str | None = None,
    panels: int = 1,
    seed: int = 0,
) -> list[Case]:
    """Varied prompts: 0 to ``max_images`` pictures of odd sizes, short and long text, several turns, typed
    placeholders; for a routed model its own routing and fixed ones in turn; for one that takes ``video`` clips and pictures of one
    scene between the others, which say where it lies if an encoder reads ``points`` (``refuse``: clips alone); for one that sees more
    than three channels pictures of so many ``panels``, every second one the colours of the one before over other values."""
    rng = np.random.default_rng(seed)
    words = [
        "what",
        "is",
        "shown",
        "here",
        "left",
        "of",
        "the",
        "small",
        "red",
        "house",
        "and",
        "why",
        "does",
        "it",
        "say",
    ]
    cases: list[Case] = []
    stills = points != "refuse"
    max_images = max_images if stills else min(max_images, MOST_VIDEOS)
    for index in range(count):
        num = index % (max_images + 1)
        pictures: list[Any] = [make_picture(rng, panels) for _ in range(num)]
        if panels > 1:
            pictures[1::2] = [other_below(picture, panels) for picture, _ in zip(pictures[::2], pictures[1::2])]
        if video:
            pictures = [
                make_visual(rng, video, points=points is not None, together=k % 3 == 2)
                if not stills or ((index + k) % 2 and k < 2 * MOST_VIDEOS)
                else p
                for k, p in enumerate(pictures)
            ]
        length = (3, 9, 40, 6)[index % 4]
        question = " ".join(rng.choice(words, length)) + "?"
        if index % 5 == 4:
            question = f"A typed <image> stays text. {question} ünï {index}"
        turns = [Turn("user", question)]
        if num and index % 3 != 2:
            turns = [Turn("user", "\n".join([IMAGE_MARK] * num) + "\n" + question)]
        elif num:  # pictures spread over the conversation
            first, rest = 1 + (num - 1) // 2, num - 1 - (num - 1) // 2
            turns = [
                Turn("user", "\n".join([IMAGE_MARK] * first) + "\n" + question),
                Turn("assistant", " ".join(rng.choice(words, 4))),
                Turn("user", "\n".join([IMAGE_MARK] * rest) + ("\n" if rest else "") + "and now?"),
            ]
        routing = None
        if experts and num:
            choices: list[Any] = [None, [experts[0]], list(experts), [experts[-1]], []]
            routing = choices[(index // 2) % len(choices)]
        cases.append(Case(f"{index:02d}: {num} images, {length} words", turns, pictures, routing))
    return cases


def make_picture(rng: np.random.Generator, panels: int = 1) -> Image.Image:
    """A random picture of odd size: colour ramps with noise, as tall again for each further panel."""
    width, height = (int(n) for n in rng.integers(17, 140, 2))
    height *= panels
    ramps = np.linspace(0, 1, width)[None, :, None] * rng.uniform(0, 255, 3) + np.linspace(0, 1, height)[
        :, None, None
    ] * rng.uniform(0, 255, 3)
    picture = Image.fromarray((ramps / 2 + rng.uniform(0, 127, (height, width, 3))).astype(np.uint8))
    return picture if panels == 1 else as_panels(picture, panels)


def other_below(picture: Image.Image, panels: int) -> Image.Image:
    """The same first panel over inverted others."""
    values = np.array(picture)
    first = picture.height // panels
    values[first:] = 255 - values[first:]
    return as_panels(Image.fromarray(values), panels)


def make_frames(rng: np.random.Generator, count: int) -> list[Image.Image]:
    """Random frames of one odd size."""
    first = make_picture(rng)
    return [first, *(make_picture(rng).resize(first.size) for _ in range(count - 1))]


def make_clip(rng: np.random.Generator, *, least: int = 2, most: int = _FRAMES + 1) -> Video:
    """A few random frames of odd size as one animated file, each shown for some tenths of a second."""
    first, *frames = make_frames(rng, int(rng.integers(least, most + 1)))
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=frames, duration=int(rng.integers(1, 9)) * 100)
    return Video(file.getvalue())


def make_visual(
    rng: np.random.Generator, video: VideoSpec, *, points: bool, together: bool = False, least: int = 2
) -> Video:
    """A clip, or (``together``) some pictures of one scene at times of their own; with cameras and depth if ``points``. Of frames that are
    chosen by the scene there are no more than are seen."""
    closed = video.which == "space_aware"
    clip = make_clip(rng, least=min(least, video.most), most=min(_FRAMES + 1, video.most) if closed else _FRAMES + 1)
    if together and video.most > 1:
        frames = make_frames(rng, int(rng.integers(2, min(_FRAMES, video.most) + 1)))
        clip = scene(frames, seconds=np.cumsum(rng.integers(1, 9, len(frames)) / 10).round(1).tolist())
    if not points:
        return clip
    count = len(clip.source) if isinstance(clip.source, list) else Image.open(io.BytesIO(clip.source)).n_frames  # type: ignore[attr-defined]
    cameras = np.tile(np.eye(4), (count, 1, 1))
    cameras[:, :3, 3] = rng.uniform(-1, 1, (count, 3))
    told = {"poses": {"matrices": cameras, "fov": [50.0, 60.0]}, "depths": rng.uniform(1, 3, (count, 8, 8))}
    return replace(clip, points=told)


def compare(
    cases: Sequence[Case], reference: Sequence[Trace], other: Sequence[Trace], *, path: str
) -> list[Difference]:
    """Every case of a path against `generate`."""
    differences = []
    for case, a, b in zip(cases, reference, other, strict=True):
        notes = []
        if a.prompt is not None and b.prompt is not None and a.prompt != b.prompt:
            notes.append("rendered prompt")
        if a.prompt_ids != b.prompt_ids:
            at = next(
                (i for i, (x, y) in enumerate(zip(a.prompt_ids, b.prompt_ids)) if x != y),
                min(len(a.prompt_ids), len(b.prompt_ids)),
            )
            notes.append(f"prompt ids from position {at} ({len(a.prompt_ids)} against {len(b.prompt_ids)})")
        if a.pixels is not None and b.pixels is not None and a.pixels != b.pixels:
            notes.append("pixels")
        if len(a.token_ids) != len(b.token_ids):
            notes.append(f"{len(a.token_ids)} against {len(b.token_ids)} tokens")
        first = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), None)
        steps = len(a.token_ids) if first is None else first + 1
        gap = 0.0
        for x, y in zip(a.logprobs[:steps], b.logprobs[:steps]):
            gap = max([gap, *(abs(x[token] - y[token]) for token in x.keys() & y.keys())])
        differences.append(Difference(case.id, path, len(b.token_ids), first, gap, notes))
    return differences


def check_encoders_matter(model: MllmForConditionalGeneration, processor: Processor, case: Case) -> dict[str, float]:
    """Encoder → largest change of a logit when that encoder's pixels (only) are another picture's, and, with `ALONE` behind its name, when
    one that sees the views of a scene together sees each alone. A parity check says nothing about an encoder, or about frames together,
    whose value here is zero. Encoders that read another in place of pixels are left out."""
    tower = _base_of(model).model.vision_tower
    _, inputs = model_inputs(processor, replace(case, experts=processor.image_processor.experts or None))
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        changes = {}
        for name, key in processor.pixel_keys.items():
            if name in tower.reads:
                continue
            after = model(**{**inputs, key: inputs[key].flip(-1) * 0.5}).logits[:, -1]
            changes[name] = float((after - before).abs().max())
        for name, encoder in tower.encoders.items():
            if isinstance(encoder, ViewsEncoder) and any(isinstance(visual, Video) for visual in case.images):
                with _frames_alone(encoder):
                    after = model(**inputs).logits[:, -1]
                changes[name + ALONE] = float((after - before).abs().max())
    return changes


@contextmanager
def _frames_alone(encoder: ViewsEncoder) -> Iterator[None]:
    """The encoder sees each view as a scene of its own."""
    together = encoder.forward

    def alone(pixels: torch.Tensor, **told: Any) -> Any:
        return together(pixels, **{**told, "scene_ids": torch.arange(len(pixels), device=pixels.device)})

    encoder.forward = alone  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder.forward


def run_parity(
    checkpoint: str,
    cases: Sequence[Case] | None = None,
    *,
    num_cases: int = 12,
    num_tokens: int = 24,
    dtype: str = "float32",
    device: str | None = None,
    vllm: bool = True,
    model_impl: str = "auto",
    engine: Mapping[str, Any] | None = None,
    memory: str | None = None,
    unmerged: bool = False,
) -> tuple[list[Difference], dict[str, float]]:
    """All paths of a checkpoint (or of a PEFT adapter folder: base with adapter, then merged) against `generate`.

    memory: what vLLM may take, as ``--memory`` says it (`mllm.models.engine_memory`).
    unmerged: vLLM serves the base with the adapter beside it instead of the merged model; the adapter must then be on
    the language part alone.
    Returns the differences, those of its heads too (`mllm.serve.head_parity`), and what each encoder moves (`check_encoders_matter`) and
    how many cases each head answers.
    """
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter, base = _adapter_base(checkpoint)
    with opening(base):
        processor = AutoProcessor.from_pretrained(base)
        model: Any = MllmForConditionalGeneration.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
    experts = list((model.config.router or {}).get("experts", ()))
    images = 5 if model.config.connector is not None else 0
    specs = processor.image_processor.specs.values()
    video = None if getattr(model.config, "video", None) is None else VideoSpec(**model.config.video)
    points = min((told for spec in specs if (told := spec.points or spec.cameras)), default=None)  # one refuses for all
    panels = max((spec.panels for spec in specs), default=1)
    cases = (
        list(cases)
        if cases is not None
        else standard_cases(num_cases, max_images=images, experts=experts, video=video, points=points, panels=panels)
    )
    with tempfile.TemporaryDirectory() as folder:
        served, lora = base, None
        if unmerged:
            lora = _lora_of(adapter)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).eval()
        reference = trace_generate(model, processor, cases, num_tokens=num_tokens)
        differences = compare(cases, reference, trace_forward(model, processor, cases, reference), path="forward")
        asked = head_cases(model, processor, cases)
        known = model_heads(_base_of(model), processor, asked)
        if asked:
            found = model_heads(_base_of(model), processor, asked, together=True)
            differences += compare_heads(asked, known, found, path="heads, all at once")
        pictured = next((case for case in cases if case.images), None)
        if pictured is not None and video is not None:
            rng = np.random.default_rng(1)
            stills = [] if points == "refuse" else [make_picture(rng, panels)]
            visuals = [*stills, make_visual(rng, video, points=points is not None, least=4)]
            pictured = Case("clip", [Turn("user", IMAGE_MARK * len(visuals) + "\nwhat happens?")], visuals)
        moved = check_encoders_matter(model, processor, pictured) if pictured is not None else {}
        moved |= answered(_base_of(model), known)
        if adapter is not None:
            model = model.merge_and_unload()
            merged = trace_generate(model, processor, cases, num_tokens=num_tokens)
            differences += compare(cases, reference, merged, path="merged adapter")
            differences += compare_heads(
                asked, known, model_heads(model, processor, asked), path="heads, merged adapter"
            )
            if not unmerged:
                served = folder
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if vllm:
            ranks = {} if lora is None else {"enable_lora": True, "max_lora_rank": max(lora[1], 8)}
            llm = open_vllm(served, dtype=dtype, model_impl=model_impl, memory=memory, **{**ranks, **(engine or {})})
            hashes = vllm_pixels(llm, processor, cases) if model_impl != "transformers" else [None] * len(cases)
            for path, batch in (("vLLM one by one", False), ("vLLM batched, caches warm", True)):
                traces = trace_vllm(llm, processor, cases, num_tokens=num_tokens, batch=batch, adapter=lora and lora[0])
                for trace, pixels in zip(traces, hashes, strict=True):
                    trace.pixels = pixels
                differences += compare(cases, reference, traces, path=path)
                if asked and model_impl != "transformers":
                    found = vllm_heads(llm, asked, batch=batch, adapter=lora and lora[0])
                    differences += compare_heads(asked, known, found, path=f"heads, {path}")
    return differences, moved


def _base_of(model: Any) -> Any:
    """The model with what an adapter has put into it, without PEFT's wrapper."""
    return getattr(model, "get_base_model", lambda: model)()


def _lora_of(adapter: str | None) -> tuple[str, int]:
    """(folder, rank) of an adapter that vLLM can serve unmerged. Raises `ConfigError` for any other."""
    if adapter is None:
        raise ConfigError("unmerged: give a PEFT adapter's folder, not a whole checkpoint")
    return adapter, adapter_rank(adapter)


def _adapter_base(checkpoint: str) -> tuple[str | None, str]:
    """(adapter folder or None, base checkpoint)."""
    if not (Path(checkpoint) / "adapter_config.json").is_file():
        return None, checkpoint
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
    if not base:
        raise UnavailableError(f"{checkpoint}: its adapter_config.json names no base_model_name_or_path")
    return checkpoint, base
