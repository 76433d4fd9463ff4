"""What does an engine draw and answer whose KV cache is too small for all its requests? Run by test_serve_drawing in a
process of its own; prints one line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoProcessor
from vllm import LLM, SamplingParams

from mllm.heads.codes.settings import vllm_options
from mllm.models.configuration_mllm import MllmConfig
from mllm.processing.chat import render_prompt
from mllm.serve.images.requests import KEY, SCHEDULER, DrawingPlan
from mllm.types import Turn

BLOCKS = 13
"""KV blocks of 32 tokens, one of which vLLM keeps; a guided drawing fills ten, any other request four or five."""
SEATS = 16


class Engine:
    """An in-process engine, the requests of a mixed load, and what was preempted."""

    def __init__(self, folder: str):
        config, processor = MllmConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        self.plan = DrawingPlan(config, processor)
        self.llm = LLM(
            folder,
            dtype="float32",
            max_model_len=160,
            max_num_seqs=SEATS,
            block_size=32,
            num_gpu_blocks_override=BLOCKS,
            enforce_eager=True,
            seed=0,
            **vllm_options(config),
            scheduler_cls=SCHEDULER,
            async_scheduling=False,
        )
        self.engine: Any = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.preempted: list[str] = []
        kept = self.scheduler._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            self.preempted.append(request.request_id)
            kept(request, *args, **kwargs)

        self.scheduler._preempt_request = preempt
        self.made = 0
        self.tokenizer = processor.tokenizer
        self.ask = lambda text: self.tokenizer(
            render_prompt(processor, [Turn("user", text)]), add_special_tokens=False
        )["input_ids"]

    def chat(self, number: int) -> list[tuple[list[int], Any]]:
        sampling = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, detokenize=False)
        return [(self.ask(f"Say {number}" + "?" * (3 * number)), sampling)]

    def drawing(self, number: int, scale: float) -> list[tuple[list[int], Any]]:
        prompt = f"Draw {number}, please, " + "greatly " * (number % 3)
        return self.plan.requests(prompt, cfg_scale=scale, temperature=0.9, top_k=20, seed=number)

    def add(self, requests: list[tuple[list[int], Any]]) -> list[str]:
        names = []
        for ids, sampling in requests:
            self.made += 1
            kind = (
                "chat"
                if sampling.extra_args is None
                else "pair"
                if sampling.extra_args[KEY]["cfg_scale"] != 1
                else "one"
            )
            names.append(f"{kind}-{self.made}")
            self.engine.add_request(names[-1], {"prompt_token_ids": ids}, sampling)
        return names

    def run(self, *sets: list[tuple[list[int], Any]], reset_at: int | None = None) -> list[list[list[int]]]:
        """Token ids of every request of every set, all asked at once. reset_at: the step after which everything that
        runs is preempted."""
        names = [self.add(requests) for requests in sets]
        answers: dict[str, list[int]] = {}
        steps = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            assert steps < 5000, "the engine does not come to an end"
            if steps == reset_at:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
        return [[answers[name] for name in group] for group in names]

    def kinds(self) -> dict[str, int]:
        """How many preemptions there were of chats, pairs and single drawings since the last call."""
        found = {kind: sum(name.startswith(kind) for name in self.preempted) for kind in ("chat", "pair", "one")}
        self.preempted.clear()
        return found

    def steady(self, number: int) -> int:
        """How many guided drawings end before a chat does that came while others waited, each followed by another."""
        for seed in range(5):
            self.add(self.drawing(seed, 2.0))
        ended, name = 0, ""
        for step in range(5000):
            if step == 5:
                name = self.add(self.chat(number))[0]
            for output in self.engine.step():
                if output.request_id == name and output.finished:
                    self.engine.abort_request([*self.engine.output_processor.request_states])
                    self.run()
                    return ended // 2
                if output.finished:
                    ended += 1
                    if ended % 2 == 0:
                        self.add(self.drawing(ended, 2.0))
        return ended // 2


def main(folder: str, *more: str) -> None:
    """more: "loads" also runs the mixed loads in which memory itself is short."""
    engine, loads = Engine(folder), "loads" in more

    def load() -> list[list[tuple[list[int], Any]]]:
        drawings = [engine.drawing(number, scale) for number, scale in enumerate((2.0, 1.0, 3.0, 1.0, 2.0, 1.0))]
        chats = [engine.chat(number) for number in range(4)]
        return [chats[0], *drawings[:2], chats[1], *drawings[2:4], chats[2], *drawings[4:], chats[3]]

    alone = [engine.run(requests)[0] for requests in load()]
    for requests, answer in zip(load(), alone, strict=True):
        if requests[0][1].extra_args:
            engine.plan.read(answer)  # raises where it is no whole drawing
    result: dict[str, Any] = {"alone_preempted": engine.kinds(), "differ": len({str(answer) for answer in alone})}

    def note(name: str, answers: list[list[list[int]]], expected: list[list[list[int]]]) -> None:
        result[name] = [answer == known for answer, known in zip(answers, expected, strict=True)]
        result[f"{name}_preempted"] = engine.kinds()

    if loads:
        note("together", engine.run(*load()), alone)
        note("backwards", engine.run(*load()[::-1]), alone[::-1])
    note("emptied", engine.run(*load(), reset_at=9), alone)
    result["ended_before_chat"] = engine.steady(4)
    engine.kinds()
    if loads:
        note("after_aborts", engine.run(*load()), alone)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
