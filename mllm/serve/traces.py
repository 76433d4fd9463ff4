"""What does one path (`generate`, trainer-style forward, vLLM) do with a prompt?"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.errors import UnavailableError
from mllm.heads.codes.settings import vllm_environment, vllm_options
from mllm.install import install_hint
from mllm.models.engine_limits import check_engine_heads
from mllm.models.engine_memory import engine_memory, need_of
from mllm.models.routing import ANSWER_TOKENS
from mllm.noise import quiet_vllm
from mllm.processing.chat import encode_text, render_prompt, routing_inputs
from mllm.processing.engine_videos import engine_options, pack
from mllm.processing.images import read_bytes
from mllm.processing.protocol import Processor
from mllm.processing.questions import question_text
from mllm.processing.template import messages_of
from mllm.routers.build import build_router
from mllm.serve.heads import HEADS_ENVIRONMENT, READER, WORKER, served_heads
from mllm.types import IMAGE_MARK, Turn, Video

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

MOST_VIDEOS = 3
"""Videos in a case, at most."""
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


def hash_pixels(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors ``(B, …)`` of one case; an encoder that sees the thumbnail alone has fewer rows than its neighbours."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_inputs(processor: Processor, case: Case) -> tuple[str, dict[str, Tensor]]:
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
def trace_generate(
    model: MllmForConditionalGeneration, processor: Processor, cases: Sequence[Case], *, num_tokens: int
) -> list[Trace]:
    """`generate`, greedy, exactly ``num_tokens`` tokens per case: end-of-text counts as any other token, and the image
    placeholder, which an untrained model may say, is left out on every path."""
    traces = []
    for case in cases:
        prompt, inputs = model_inputs(processor, case)
        moved: dict[str, Any] = {key: value.to(model.device) for key, value in inputs.items()}
        output = model.generate(
            **moved,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[processor.image_token_id, *model.config.unassigned_ids],
            tokenizer=processor.tokenizer,
            output_logits=True,
            return_dict_in_generate=True,
        )
        width = inputs["input_ids"].shape[1]
        tokens = output.sequences[0, width:].tolist()
        logprobs = [_top(step[0], token) for step, token in zip(output.logits, tokens, strict=True)]
        pixels = processor.pixel_keys.split(inputs)[0]
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
def trace_forward(
    model: MllmForConditionalGeneration, processor: Processor, cases: Sequence[Case], reference: Sequence[Trace]
) -> list[Trace]:
    """The trainer's way: prompt and ``reference`` answer in one forward pass without a cache; each position's best
    token."""
    traces = []
    for case, known in zip(cases, reference, strict=True):
        prompt, inputs = model_inputs(processor, case)
        layouts = processor.image_layouts(case.images, where=case.id)
        ids, _ = encode_text(processor, [*case.turns, Turn("assistant", "x")], where=case.id, layouts=layouts)
        count = len(known.prompt_ids)
        full = torch.tensor([ids[:count].tolist() + known.token_ids])
        moved: dict[str, Any] = {
            key: value.to(model.device) for key, value in inputs.items() if key != "attention_mask"
        }
        moved["input_ids"] = full.to(model.device)
        if known.routing is not None:
            moved["expert_weights"] = torch.tensor(known.routing, device=model.device)
        logits = model(**moved).logits[0, count - 1 : -1]
        allowed = logits.clone()
        allowed[:, [processor.image_token_id, *model.config.unassigned_ids]] = float("-inf")
        tokens = allowed.argmax(-1).tolist()
        logprobs = [_top(step, token) for step, token in zip(logits, tokens, strict=True)]
        pixels = processor.pixel_keys.split(inputs)[0]
        traces.append(Trace(ids[:count].tolist(), tokens, logprobs, prompt, hash_pixels(pixels) if pixels else None))
    return traces


def _top(logits: Tensor, token: int) -> dict[int, float]:
    values = logits.float().log_softmax(-1)
    best = values.topk(min(TOP, len(values))).indices.tolist()
    return {index: float(values[index]) for index in {*best, token}}


# ----------------------------------------------------------------------------------------------------------------- vLLM


@quiet_vllm()
def open_vllm(
    checkpoint: str,
    *,
    dtype: str = "float32",
    model_impl: str = "auto",
    memory: str | None = None,
    **options: Any,
) -> Any:
    """A vLLM engine inside this process, in the memory that is free (``memory``: as ``--memory`` says it). Raises
    `UnavailableError` without vLLM, `ConfigError` where it does not fit or does not run here."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint)
    check_engine_heads(checkpoint, config)
    try:
        from vllm import LLM
    except ImportError:
        raise UnavailableError(
            f"vLLM is not installed: {install_hint('serve')}, or with serve-cpu without a GPU"
        ) from None
    ours = vllm_options(config, draws=model_impl != "transformers")
    environment = vllm_environment(ours)
    if model_impl != "transformers" and served_heads(getattr(config, "heads", None)) is not None:
        ours["logits_processors"] = [*ours.get("logits_processors", ()), READER]
        ours["worker_extension_cls"] = WORKER
        environment |= HEADS_ENVIRONMENT
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    need = need_of(checkpoint, config, dtype=dtype, length=options.get("max_model_len"), seats=8)
    given = [f"--{name.replace('_', '-')}" for name in options]
    settings: dict[str, Any] = {
        **engine_memory(need, memory, given),
        "dtype": dtype,
        "model_impl": model_impl,
        **engine_options(config),
        "max_logprobs": TOP + 1,
        "enforce_eager": True,
        "seed": 0,
        "max_num_seqs": 8,
        **ours,
        **options,
    }
    return LLM(checkpoint, **settings)


def trace_vllm(
    llm: Any,
    processor: Processor,
    cases: Sequence[Case],
    *,
    num_tokens: int,
    batch: bool = False,
    adapter: str | None = None,
) -> list[Trace]:
    """The same conversations through vLLM's chat interface, one by one or all at once (cases of equal routing
    together). adapter: folder of a LoRA adapter on the language model, applied unmerged."""
    from vllm import SamplingParams

    lora = lora_request(adapter)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=TOP, detokenize=False)
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
            lora_request=lora,
            chat_template_content_format="openai",
            mm_processor_kwargs=None if experts is None else {"experts": experts},
        )
        for index, output in zip(indices, outputs, strict=True):
            answer = output.outputs[0]
            logprobs = [{token: entry.logprob for token, entry in step.items()} for step in answer.logprobs]
            traces[index] = Trace(list(output.prompt_token_ids), list(answer.token_ids), logprobs)
    return [trace for trace in traces if trace is not None]


def lora_request(adapter: str | None) -> Any:
    """What tells vLLM of a LoRA adapter's folder; None without one."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, adapter)


def route_vllm(llm: Any, case: Case) -> Any:
    """A case's routing as vLLM needs it: that of a ``language_model`` router is asked for, picture by picture."""
    from vllm import SamplingParams

    router = llm.llm_engine.vllm_config.model_config.hf_config.router
    if router["type"] != "language_model" or case.experts is not None or not case.images:
        return case.experts
    router_module: Any = build_router(dict(router), 0, 0)
    questions = [question_text(t.content, IMAGE_MARK) for t in case.turns for _ in range(t.content.count(IMAGE_MARK))]
    requests = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": image},
                    {"type": "text", "text": router_module.prompt(question)},
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
    routing, _ = router_module.decide([output.outputs[0].text.strip() for output in outputs])
    return [dict(zip(router["experts"], row, strict=True)) for row in routing.weights.tolist()]


def vllm_messages(case: Case) -> list[dict[str, Any]]:
    """A case as chat messages that carry their pictures."""
    pictures = iter(case.images)
    messages = messages_of(case.turns, IMAGE_MARK)
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                _vllm_part(next(pictures)) if part["type"] == "image" else part for part in message["content"]
            ]
    return messages


def _vllm_part(visual: Any) -> dict[str, Any]:
    if not isinstance(visual, Video):
        return {"type": "image_pil", "image_pil": visual}
    listed = isinstance(visual.source, list)  # pictures of a scene travel as the server packs them
    content = pack(visual).tobytes() if listed else read_bytes(visual.source, where="video")
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(content).decode()}"}}


def vllm_pixels(llm: Any, processor: Processor, cases: Sequence[Case]) -> list[str | None]:
    """Hash of the pixels that vLLM's own input processing makes of each case."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = llm.llm_engine.vllm_config.model_config
    multimodal = MULTIMODAL_REGISTRY.create_processor(config)
    hashes: list[str | None] = []
    for case in cases:
        if not case.images or any(isinstance(visual, Video) for visual in case.images):
            hashes.append(None)
            continue
        items = multimodal.info.parse_mm_data({"image": case.images})
        settings = {"experts": "none"} if processor.image_processor.experts else {}
        result = multimodal(render_prompt(processor, case.turns), items, hf_processor_mm_kwargs=settings)
        rows: Any = result["mm_kwargs"]["image"]
        keys = processor.pixel_keys.values()
        join = torch.cat if processor.rules.needs_size else torch.stack  # views of an image, or the image
        hashes.append(hash_pixels({key: join([row[key].data for row in rows]) for key in keys}))
    return hashes
