"""Does a checkpoint say the same in training, in `generate`, with its adapter merged, and in vLLM?"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.errors import UnavailableError
from mllm.models.routing import ANSWER_TOKENS
from mllm.processing.chat import encode_text, question_text, render_prompt, routing_inputs
from mllm.processing.template import messages_of
from mllm.routers.build import build_router
from mllm.types import IMAGE_MARK, Turn

TOP = 5
"""Most likely tokens that are compared per position."""


@dataclass
class Case:
    """One prompt. ``images`` in order of their marks; ``experts``: a fixed routing, None: the model's own."""

    id: str
    turns: list[Turn]
    images: list[Any] = field(default_factory=list)
    experts: Any = None


@dataclass
class Trace:
    """What one path did with a case. logprobs: per generated token, token id → log probability of the most likely
    ones (and of the one taken); pixels: sha256 of all pixel tensors."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    prompt: str | None = None
    pixels: str | None = None
    routing: list[list[float]] | None = None
    """Weights per image and expert, where known."""


@dataclass
class Difference:
    """How a path differs from `generate` on a case. first: position of the first other token, None: none; gap: the
    largest difference of a log probability up to there; notes: what else differs."""

    case: str
    path: str
    num_tokens: int
    first: int | None
    gap: float
    notes: list[str]

    @property
    def same(self) -> bool:
        """Equal prompt, pixels and tokens."""
        return self.first is None and not self.notes


def standard_cases(count: int = 12, *, max_images: int = 5, experts: Sequence[str] = (), seed: int = 0) -> list[Case]:
    """Varied prompts: 0 to ``max_images`` pictures of odd sizes, short and long text, several turns, typed
    placeholders; for a routed model its own routing and fixed ones in turn."""
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
    for index in range(count):
        num = index % (max_images + 1)
        pictures = [make_picture(rng) for _ in range(num)]
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


def make_picture(rng: np.random.Generator) -> Image.Image:
    """A random picture of odd size: colour ramps with noise."""
    width, height = (int(n) for n in rng.integers(17, 140, 2))
    ramps = np.linspace(0, 1, width)[None, :, None] * rng.uniform(0, 255, 3) + np.linspace(0, 1, height)[
        :, None, None
    ] * rng.uniform(0, 255, 3)
    return Image.fromarray((ramps / 2 + rng.uniform(0, 127, (height, width, 3))).astype(np.uint8))


def hash_pixels(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors ``(B, …)``, image by image, so that batching does not matter."""
    digest = hashlib.sha256()
    for row in range(len(next(iter(tensors.values()), []))):
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name][row].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- transformers


def model_inputs(processor: Any, case: Case) -> tuple[str, dict[str, Tensor]]:
    """The rendered prompt and the inputs that `generate` takes."""
    prompt = render_prompt(processor, case.turns)
    inputs = processor(
        text=[prompt],
        images=[case.images] if case.images else None,
        return_tensors="pt",
        add_special_tokens=False,
        **({"experts": case.experts} if case.experts is not None and case.images else {}),
    )
    return prompt, {**inputs, **routing_inputs(processor, case.turns, len(case.images))}


@torch.no_grad()
def trace_generate(model: Any, processor: Any, cases: Sequence[Case], *, num_tokens: int) -> list[Trace]:
    """`generate`, greedy, exactly ``num_tokens`` tokens per case: end-of-text counts as any other token, and the image
    placeholder, which an untrained model may say, is left out on every path."""
    traces = []
    keys = set(processor.pixel_keys.values())
    for case in cases:
        prompt, inputs = model_inputs(processor, case)
        moved = {key: value.to(model.device) for key, value in inputs.items()}
        output = model.generate(
            **moved,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[processor.image_token_id],
            tokenizer=processor.tokenizer,
            output_logits=True,
            return_dict_in_generate=True,
        )
        width = inputs["input_ids"].shape[1]
        tokens = output.sequences[0, width:].tolist()
        logprobs = [_top(step[0], token) for step, token in zip(output.logits, tokens, strict=True)]
        pixels = {key: value for key, value in inputs.items() if key in keys}
        routing = getattr(output, "routing", None)
        traces.append(
            Trace(
                inputs["input_ids"][0].tolist(),
                tokens,
                logprobs,
                prompt,
                hash_pixels(pixels) if pixels else None,
                None if routing is None else routing.weights.tolist(),
            )
        )
    return traces


@torch.no_grad()
def trace_forward(model: Any, processor: Any, cases: Sequence[Case], reference: Sequence[Trace]) -> list[Trace]:
    """The trainer's way: prompt and ``reference`` answer in one forward pass without a cache; each position's best
    token."""
    traces = []
    for case, known in zip(cases, reference, strict=True):
        prompt, inputs = model_inputs(processor, case)
        ids, _ = encode_text(processor, [*case.turns, Turn("assistant", "x")], where=case.id)
        count = len(known.prompt_ids)
        full = torch.tensor([ids[:count].tolist() + known.token_ids])
        moved = {key: value.to(model.device) for key, value in inputs.items() if key != "attention_mask"}
        moved["input_ids"] = full.to(model.device)
        if known.routing is not None:
            moved["expert_weights"] = torch.tensor(known.routing, device=model.device)
        logits = model(**moved).logits[0, count - 1 : -1]
        allowed = logits.clone()
        allowed[:, processor.image_token_id] = float("-inf")
        tokens = allowed.argmax(-1).tolist()
        logprobs = [_top(step, token) for step, token in zip(logits, tokens, strict=True)]
        pixels = {key: value for key, value in inputs.items() if key in set(processor.pixel_keys.values())}
        traces.append(Trace(ids[:count].tolist(), tokens, logprobs, prompt, hash_pixels(pixels) if pixels else None))
    return traces


def _top(logits: Tensor, token: int) -> dict[int, float]:
    values = logits.float().log_softmax(-1)
    best = values.topk(min(TOP, len(values))).indices.tolist()
    return {index: float(values[index]) for index in {*best, token}}


# ----------------------------------------------------------------------------------------------------------------- vLLM


def open_vllm(
    checkpoint: str, *, dtype: str = "float32", model_impl: str = "auto", max_images: int = 5, **options: Any
) -> Any:
    """A vLLM engine inside this process. Raises `UnavailableError` without vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM
    except ImportError:
        raise UnavailableError(
            "vLLM is not installed: pip install 'mllm[serve]', or 'mllm[serve-cpu]' without a GPU"
        ) from None
    settings = {"enforce_eager": True, "seed": 0, "max_num_seqs": 8, **options}
    return LLM(
        checkpoint,
        dtype=dtype,
        model_impl=model_impl,
        limit_mm_per_prompt={"image": max_images},
        max_logprobs=TOP + 1,
        **settings,
    )


def trace_vllm(llm: Any, processor: Any, cases: Sequence[Case], *, num_tokens: int, batch: bool = False) -> list[Trace]:
    """The same conversations through vLLM's chat interface, one by one or all at once (cases of equal routing
    together)."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        logprobs=TOP,
        detokenize=False,
        logit_bias={processor.image_token_id: -100.0},
    )
    groups: dict[str, list[int]] = {}
    routings = [case.experts for case in cases]
    if llm.llm_engine.vllm_config.model_config.hf_config.router is not None:
        routings = [route_vllm(llm, case) for case in cases]
    for index in range(len(cases)):
        groups.setdefault(repr(routings[index]) if batch else str(index), []).append(index)
    traces: list[Trace | None] = [None] * len(cases)
    for indices in groups.values():
        experts = routings[indices[0]]
        outputs = llm.chat(
            [vllm_messages(cases[index]) for index in indices],
            sampling,
            use_tqdm=False,
            chat_template_content_format="openai",
            mm_processor_kwargs=None if experts is None else {"experts": experts},
        )
        for index, output in zip(indices, outputs, strict=True):
            answer = output.outputs[0]
            logprobs = [{token: entry.logprob for token, entry in step.items()} for step in answer.logprobs]
            traces[index] = Trace(list(output.prompt_token_ids), list(answer.token_ids), logprobs)
    return [trace for trace in traces if trace is not None]


def route_vllm(llm: Any, case: Case) -> Any:
    """A case's routing as vLLM needs it: that of a ``language_model`` router is asked for, picture by picture."""
    from vllm import SamplingParams

    router = llm.llm_engine.vllm_config.model_config.hf_config.router
    if router["type"] != "language_model" or case.experts is not None or not case.images:
        return case.experts
    asked = build_router(dict(router), 0, 0)
    questions = [question_text(t.content, IMAGE_MARK) for t in case.turns for _ in range(t.content.count(IMAGE_MARK))]
    requests = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": image},
                    {"type": "text", "text": asked.prompt(question)},
                ],
            }
        ]
        for image, question in zip(case.images, questions, strict=True)
    ]
    outputs = llm.chat(
        requests,
        SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS),
        use_tqdm=False,
        chat_template_content_format="openai",
        mm_processor_kwargs={"routing_pass": True},
    )
    routing, _ = asked.decide([output.outputs[0].text.strip() for output in outputs])
    return [dict(zip(router["experts"], row, strict=True)) for row in routing.weights.tolist()]


def vllm_messages(case: Case) -> list[dict[str, Any]]:
    """A case as chat messages that carry their pictures."""
    pictures = iter(case.images)
    messages = messages_of(case.turns, IMAGE_MARK)
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image_pil", "image_pil": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ]
    return messages


def vllm_pixels(llm: Any, processor: Any, cases: Sequence[Case]) -> list[str | None]:
    """Hash of the pixels that vLLM's own input processing makes of each case."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = llm.llm_engine.vllm_config.model_config
    multimodal = MULTIMODAL_REGISTRY.create_processor(config)
    keys = list(processor.pixel_keys.values())
    hashes: list[str | None] = []
    for case in cases:
        if not case.images:
            hashes.append(None)
            continue
        items = multimodal.info.parse_mm_data({"image": case.images})
        settings = {"experts": "none"} if processor.image_processor.experts else {}
        result = multimodal(render_prompt(processor, case.turns), items, hf_processor_mm_kwargs=settings)
        rows: Any = result["mm_kwargs"]["image"]
        hashes.append(hash_pixels({key: torch.stack([row[key].data for row in rows]) for key in keys}))
    return hashes


# -------------------------------------------------------------------------------------------------------------- compare


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


def check_encoders_matter(model: Any, processor: Any, case: Case) -> dict[str, float]:
    """Encoder → largest change of a logit when that encoder's pixels (only) are another picture's. A parity check
    says nothing about an encoder whose value here is zero."""
    _, inputs = model_inputs(processor, replace(case, experts=processor.image_processor.experts or None))
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        changes = {}
        for name, key in processor.pixel_keys.items():
            after = model(**{**inputs, key: inputs[key].flip(-1) * 0.5}).logits[:, -1]
            changes[name] = float((after - before).abs().max())
    return changes


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
) -> tuple[list[Difference], dict[str, float]]:
    """All paths of a checkpoint (or of a PEFT adapter folder: base with adapter, then merged) against `generate`.

    Returns the differences and what each encoder moves (`check_encoders_matter`).
    """
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter, base = _adapter_base(checkpoint)
    processor = AutoProcessor.from_pretrained(base)
    model: Any = MllmForConditionalGeneration.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
    experts = list((model.config.router or {}).get("experts", ()))
    images = 5 if model.config.connector is not None else 0
    cases = list(cases) if cases is not None else standard_cases(num_cases, max_images=images, experts=experts)
    with tempfile.TemporaryDirectory() as folder:
        served = base
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).eval()
        reference = trace_generate(model, processor, cases, num_tokens=num_tokens)
        differences = compare(cases, reference, trace_forward(model, processor, cases, reference), path="forward")
        pictured = next((case for case in cases if case.images), None)
        moved = check_encoders_matter(model, processor, pictured) if pictured is not None else {}
        if adapter is not None:
            model = model.merge_and_unload()
            merged = trace_generate(model, processor, cases, num_tokens=num_tokens)
            differences += compare(cases, reference, merged, path="merged adapter")
            served = folder
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if vllm:
            llm = open_vllm(served, dtype=dtype, model_impl=model_impl, **(engine or {}))
            hashes = vllm_pixels(llm, processor, cases) if model_impl != "transformers" else [None] * len(cases)
            for path, batch in (("vLLM one by one", False), ("vLLM batched, caches warm", True)):
                traces = trace_vllm(llm, processor, cases, num_tokens=num_tokens, batch=batch)
                for trace, pixels in zip(traces, hashes, strict=True):
                    trace.pixels = pixels
                differences += compare(cases, reference, traces, path=path)
    return differences, moved


def _adapter_base(checkpoint: str) -> tuple[str | None, str]:
    """(adapter folder or None, base checkpoint)."""
    if not (Path(checkpoint) / "adapter_config.json").is_file():
        return None, checkpoint
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
    if not base:
        raise UnavailableError(f"{checkpoint}: its adapter_config.json names no base_model_name_or_path")
    return checkpoint, base
