"""What does one in-process vLLM engine answer for a routed model, beside `generate`? Run by test_serve_vllm in a
process of its own, since vLLM patches transformers; prints one line of JSON."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

from transformers import AutoProcessor

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.serve import parity
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import picture

TOKENS = 10


def case(question: str, image, experts=None) -> parity.Case:
    return parity.Case(question, [Turn("user", f"{IMAGE_MARK}\n{question}")], [image], experts)


def questions_that_route_differently(model, processor, image) -> list[str]:
    """One question for each expert that the gate chooses for this image."""
    found: dict[str, str] = {}
    for number in range(200):
        question = f"{chr(97 + number % 26) * (1 + number % 7)} {number}?"
        trace = parity.trace_generate(model, processor, [case(question, image)], num_tokens=1)[0]
        found.setdefault(str(trace.routing), question)
        if len(found) == 2:
            break
    return list(found.values())


def told(model, processor, llm, image, questions: list[str]) -> list[bool]:
    """For every question, whether the engine tells of the experts that `generate` asks; and of an unasked one nothing."""
    from mllm.serve.http.stats import picture_key

    file = io.BytesIO()
    image.save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    right = []
    for question in questions:
        part = {"type": "image_url", "image_url": {"url": address}}
        llm.chat([{"role": "user", "content": [part, {"type": "text", "text": f"  {question} "}]}], use_tqdm=False)
        weights = parity.trace_generate(model, processor, [case(question, image)], num_tokens=1)[0].routing[0]
        names = [name for name, weight in zip(processor.image_processor.experts, weight_list(weights)) if weight]
        known = llm.collective_rpc("chosen_experts", args=([picture_key(file.getvalue(), question)],))[0]
        right.append([chosen for _, chosen in known] == [names])
    unasked = llm.collective_rpc("chosen_experts", args=([picture_key(file.getvalue(), "unasked")],))[0]
    return [*right, unasked == []]


def weight_list(weights) -> list[float]:
    return list(weights.values()) if isinstance(weights, dict) else list(weights)


def main(folder: str) -> None:
    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    result: dict = {}
    varied = parity.standard_cases(12, experts=processor.image_processor.experts)
    references = parity.trace_generate(model, processor, varied, num_tokens=TOKENS)
    result["moved"] = parity.check_encoders_matter(model, processor, varied[1])

    image = picture(7, size=(61, 47))
    fixed = [
        case("which?", image, experts) for experts in (["spatial"], ["detail"], [], {"spatial": 0.7, "detail": 0.3})
    ]
    fixed_references = parity.trace_generate(model, processor, fixed, num_tokens=TOKENS)
    result["fixed_distinct"] = len({tuple(trace.token_ids) for trace in fixed_references})
    questions = questions_that_route_differently(model, processor, image)
    asked = [case(question, image) for question in questions]
    asked_references = parity.trace_generate(model, processor, asked, num_tokens=TOKENS)
    result["routings"] = [trace.routing for trace in asked_references]

    engine = {"block_size": 32, "max_model_len": 512, "worker_extension_cls": "mllm.serve.http.stats.VisualStatistics"}
    llm = parity.open_vllm(folder, model_impl="vllm", **engine)

    def equal(cases, known, **options):
        traces = parity.trace_vllm(llm, processor, cases, num_tokens=TOKENS, **options)
        return [difference.same for difference in parity.compare(cases, known, traces, path="vLLM")]

    hashes = parity.vllm_pixels(llm, processor, varied)
    result["pixels"] = [trace.pixels == found for trace, found in zip(references, hashes, strict=True)]
    result["cold"] = equal(varied, references)
    result["warm"] = equal(varied, references)
    result["batched"] = equal(varied, references, batch=True)
    result["fixed_forth"] = equal(fixed, fixed_references)
    result["fixed_back"] = equal(fixed[::-1], fixed_references[::-1])
    result["fixed_together"] = equal(fixed, fixed_references, batch=True)
    result["asked_forth"] = equal(asked, asked_references)
    result["asked_back"] = equal(asked[::-1], asked_references[::-1])
    result["asked_together"] = equal(asked, asked_references, batch=True)
    try:
        parity.trace_vllm(llm, processor, [case("which?", image, ["spatail"])], num_tokens=1)
        result["unknown_expert"] = "accepted"
    except ValueError as error:
        result["unknown_expert"] = str(error)
    before = llm.collective_rpc("visual_statistics")[0]
    fresh = [case("which?", picture(100 + n), experts) for n, experts in enumerate((["spatial"], ["detail"], []))]
    parity.trace_vllm(llm, processor, fresh, num_tokens=1)
    after = llm.collective_rpc("visual_statistics")[0]
    result["ran"] = {name: after[name]["images"] - before[name]["images"] for name in after}
    result["seconds"] = {name: after[name]["seconds"] for name in after}
    result["told"] = told(model, processor, llm, image, questions)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1])
