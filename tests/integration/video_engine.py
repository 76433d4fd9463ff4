"""What does one in-process vLLM engine answer to videos, beside `generate`? Run by test_serve_vllm in a process of its own, since
vLLM patches transformers; prints one line of JSON."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
from transformers import AutoProcessor

from mllm.eval.generators.hf import HFGenerator
from mllm.eval.generators.vllm import VLLMGenerator
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt
from mllm.processing.engine_videos import visual_inputs
from mllm.processing.frames import VideoSpec
from mllm.processing.template import VIDEO
from mllm.serve import parity
from mllm.types import IMAGE_MARK, Request, Turn, Video, scene
from tests.helpers import picture

TOKENS = 10


def case(name: str, *visuals) -> parity.Case:
    return parity.Case(name, [Turn("user", IMAGE_MARK * len(visuals) + "\nwhat happens?")], list(visuals))


def photo(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def main(folder: str) -> None:
    from vllm import SamplingParams

    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    varied = parity.standard_cases(12, video=VideoSpec(**model.config.video))
    references = parity.trace_generate(model, processor, varied, num_tokens=TOKENS)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 30, 40, 3), dtype=np.uint8)
    clip = parity.make_clip(rng)
    arrays = [case(f"{fps} fps", Video(frames, fps=fps)) for fps in (1.0, 2.0)]
    parts = [
        case(name, picture(1), Video(clip.source, **part), picture(2), clip)
        for name, part in {"whole": {}, "reversed": {"play": "reversed"}, "first": {"frames": (0,)}}.items()
    ]
    known = parity.trace_generate(model, processor, [*arrays, *parts], num_tokens=TOKENS)
    views = [photo(number) for number in range(3)]
    scenes = [
        case(name, picture(1), replace(scene(order), fps=1.0))
        for name, order in {"scene": views, "turned round": views[::-1], "two": views[:2]}.items()
    ]
    seen = parity.trace_generate(model, processor, scenes, num_tokens=TOKENS)

    engine = {"block_size": 32, "max_model_len": 1024}
    llm = parity.open_vllm(folder, **engine)
    result: dict = {"videos": sum(isinstance(visual, Video) for each in varied for visual in each.images)}
    for path, batch in (("one by one", False), ("batched", True)):
        traces = parity.trace_vllm(llm, processor, varied, num_tokens=TOKENS, batch=batch)
        result[path] = [d.case for d in parity.compare(varied, references, traces, path=path) if not d.same]

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompt = render_prompt(processor, arrays[0].turns).replace(processor.image_token, VIDEO)
    given = [{"prompt": prompt, "multi_modal_data": {"video": [(frames, {"fps": fps})]}} for fps in (1.0, 2.0)]
    answers = [list(output.outputs[0].token_ids) for output in llm.generate(given, sampling, use_tqdm=False)]
    result["arrays"] = [answer == trace.token_ids for answer, trace in zip(answers, known)]
    result["arrays differ"] = known[0].token_ids != known[1].token_ids

    generator = VLLMGenerator.__new__(VLLMGenerator)  # with the engine that runs: a second one does not fit beside it
    generator.processor, generator.llm, generator._ours = processor, llm, True
    prompts = [generator._tokens(generator.render(Request(each.id, each.turns, each.images))) for each in parts]
    given = [
        {"prompt_token_ids": ids} | visual_inputs(ids, each.images, processor, where=each.id)
        for ids, each in zip(prompts, parts, strict=True)
    ]
    answers = [list(output.outputs[0].token_ids) for output in llm.generate(given, sampling, use_tqdm=False)]
    result["evaluation"] = [[answer, trace.token_ids] for answer, trace in zip(answers, known[2:], strict=True)]
    result["parts differ"] = len({tuple(trace.token_ids) for trace in known[2:]})

    options = {"max_new_tokens": TOKENS, "do_sample": False}
    crowd = case("twelve pictures", *(picture(number) for number in range(12)))
    asked = [Request(each.id, each.turns, each.images, options) for each in (*parts, *scenes, crowd)]
    wrong = [
        Request("unreadable", parts[0].turns, [picture(1), Video(b"no film"), picture(2), clip], options),
        Request("too long", [Turn("user", "one two " * 2000)], [], options),
        Request("too few", parts[0].turns, [picture(1)], options),
    ]
    found = {reply.id: reply for reply in generator.generate([wrong[0], *asked, *wrong[1:]])}
    result["failed"] = {each.id: found[each.id].error for each in wrong}
    known = HFGenerator(model, processor).generate([*asked])
    result["asked"] = [[found[reply.id].text, reply.text, found[reply.id].error] for reply in known]

    traces = parity.trace_vllm(llm, processor, scenes, num_tokens=TOKENS, batch=True)
    result["scenes"] = [[trace.token_ids, known.token_ids] for trace, known in zip(traces, seen, strict=True)]

    result["refused"] = []
    for data in ({"video": [frames, frames]}, {"video": [(frames, {"fps": 0.0})]}):
        try:
            llm.generate([{"prompt": prompt, "multi_modal_data": data}], sampling, use_tqdm=False)
            result["refused"].append("")
        except Exception as error:
            result["refused"].append(str(error))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
