"""What does one in-process vLLM engine draw, beside `generate_images`? Run by test_serve_drawing in a process of its own,
since vLLM patches transformers; prints one line of JSON."""

from __future__ import annotations

import json
import sys

from transformers import AutoProcessor
from vllm import LLM

from mllm.heads.codes.settings import vllm_options
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.serve.images.requests import SCHEDULER, BrokenDrawing, DrawingPlan, draw_with_engine

PROMPTS = ["Draw a seven, please", "One", "Hello, draw something of great beauty", "A cat"]


def main(folder: str) -> None:
    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def expected(**options):
        return model.generate_images(PROMPTS, processor=processor, **options).packed

    plan = DrawingPlan(model.config, processor)
    greedy = {scale: expected(cfg_scale=scale, temperature=0) for scale in (1.0, 3.0)}
    sampled = {"cfg_scale": 2.0, "temperature": 0.9, "top_k": 12, "top_p": 0.9, "seed": 7}
    result: dict = {
        "guidance_moves": int((greedy[1.0] != greedy[3.0]).sum()),
        "prompts_differ": len({tuple(row) for row in greedy[3.0].tolist()}),
    }
    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=5,  # two pairs and a seat
        max_num_batched_tokens=256,
        enforce_eager=True,
        seed=0,
        **vllm_options(model.config),
        scheduler_cls=SCHEDULER,
        async_scheduling=False,
    )
    for scale, codes in greedy.items():
        options = {"cfg_scale": scale, "temperature": 0.0}
        result[f"batch_{scale:g}"] = draw_with_engine(llm, plan, PROMPTS, **options).equal(codes)
        result[f"single_{scale:g}"] = [
            draw_with_engine(llm, plan, [prompt], **options)[0].equal(row) for prompt, row in zip(PROMPTS, codes)
        ]
    first = draw_with_engine(llm, plan, PROMPTS, **sampled)
    result["sampled_as_generate"] = first.equal(expected(**sampled))
    result["sampled_again"] = first.equal(draw_with_engine(llm, plan, PROMPTS, **sampled))
    result["sampled_other_seed"] = first.equal(draw_with_engine(llm, plan, PROMPTS, **{**sampled, "seed": 99}))
    ids, sampling = plan.requests(PROMPTS[0], cfg_scale=3.0)[0]
    alone = llm.generate([{"prompt_token_ids": ids}], [sampling], use_tqdm=False)[0].outputs[0].token_ids
    try:
        plan.read([alone, alone])
        result["alone"] = "drawn"
    except BrokenDrawing as error:
        result["alone"] = str(error)
    result["after_alone"] = draw_with_engine(llm, plan, PROMPTS, **sampled).equal(first)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
