"""How does vLLM in this process answer?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from mllm.damage import parts_alone
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.eval.generators.base import GeneratorSettings, answer_text, check_marks, checkpoint_hash, hf_messages
from mllm.heads.codes.settings import vllm_environment, vllm_options
from mllm.install import install_hint
from mllm.models.configuration_mllm import component_code
from mllm.models.engine_limits import check_engine_heads
from mllm.models.engine_memory import SEATS, Need, cpu_cache, free_memory, need_of
from mllm.noise import quiet_vllm
from mllm.processing.engine_videos import engine_options, visual_inputs
from mllm.types import Request, Response

_WINDOW = 1024
_OF_GPU, _SHORTEST = 0.9, 2048


def own_gpu(environment: Mapping[str, str], count: int) -> dict[str, str]:
    """What vLLM's engine, a process of its own, must find in its environment to take this process's GPU of the ``count`` that are
    seen; nothing for one process or one GPU."""
    rank = environment.get("LOCAL_RANK")
    if rank is None or count < 2:
        return {}
    seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = seen if len(seen) == count and all(seen) else [str(k) for k in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[int(rank) % count]}


def memory_share(environment: Mapping[str, str], gpus: int) -> dict[str, float]:
    """What part of a GPU's memory an engine may take beside those of this machine's other processes; nothing (vLLM's own default) where
    each has a GPU of its own."""
    sharing = -(-int(environment.get("LOCAL_WORLD_SIZE", 1)) // gpus)
    return {} if sharing == 1 else {"gpu_memory_utilization": round(_OF_GPU / sharing, 3)}


def host_memory(environment: Mapping[str, str], need: Need, free: int, total: int) -> dict[str, int]:
    """How much of the host's memory an engine without a GPU may take for keys and values: what its requests can need, in its part of what
    is ``free`` of ``total`` bytes. Of itself vLLM takes nearly all there is. A context for which that is too little is halved until one
    request fits: a longer one is that request's error. Raises `ConfigError` where none of `_SHORTEST` tokens does."""
    processes, whole = int(environment.get("LOCAL_WORLD_SIZE", 1)), need.length
    while True:
        try:
            cache = cpu_cache(need, None, free=free // processes, total=total // processes)
        except ConfigError:
            if need.length // 2 < _SHORTEST:
                raise
            need = replace(need, length=need.length // 2)
        else:
            return {"kv_cache_memory_bytes": cache} | ({} if need.length == whole else {"max_model_len": need.length})


class VLLMGenerator:
    """A checkpoint in vLLM's own engine, which batches continuously.

    engine: further arguments of ``vllm.LLM``. model_hash names the weights in the fingerprint; default: a hash over the
    checkpoint's files, or the hub id.
    """

    @quiet_vllm()
    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: Any = "auto",
        model_hash: str | None = None,
        engine: dict[str, Any] | None = None,
        memory: Mapping[str, float] | None = None,
    ):
        """engine: vLLM's options, part of the fingerprint; memory: one of them that is none, since no answer hangs on it."""
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write("starting vLLM, which takes a minute or more (--verbose shows what it says) …\n")
        if parts := parts_alone(checkpoint):
            raise CheckpointError(parts)
        from transformers import AutoConfig, AutoProcessor

        config = AutoConfig.from_pretrained(checkpoint)
        check_engine_heads(checkpoint, config)
        try:
            from vllm import LLM
        except ImportError:
            raise UnavailableError(
                f"the vLLM generator needs vllm: {install_hint('serve')}, or with serve-cpu without a GPU"
            ) from None
        self.name, self._dtype, self._hash = f"vllm:{checkpoint}", dtype, model_hash or checkpoint_hash(checkpoint)
        self._engine_options = dict(engine or {})
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self._ours = hasattr(self.processor, "pixel_keys")
        self._code = component_code(config)
        options = {**(memory or {}), **vllm_options(config), **self._engine_options}
        for name, value in vllm_environment(options).items():
            os.environ.setdefault(name, value)
        self.llm = LLM(model=checkpoint, dtype=dtype, **{**engine_options(config), **options})

    @classmethod
    def open(cls, checkpoint: str, settings: GeneratorSettings) -> VLLMGenerator:
        """A checkpoint folder or hub id. Under a launcher each process has an engine of its own on the GPU of its LOCAL_RANK."""
        if gpus := torch.cuda.device_count():
            memory = memory_share(os.environ, gpus)
        else:
            from transformers import AutoConfig

            config: Any = AutoConfig.from_pretrained(checkpoint)
            need = need_of(checkpoint, config, dtype=settings.dtype, length=None, seats=SEATS)
            memory = host_memory(os.environ, need, *free_memory())
        os.environ |= own_gpu(os.environ, gpus)  # from here on one GPU is counted
        return cls(checkpoint, dtype=settings.dtype, memory=memory)

    @property
    def takes_video(self) -> bool:
        """Whether a request's images may be `Video`s, whose frames the model's processor chooses."""
        return getattr(self.processor, "takes_video", False)

    def fingerprint(self) -> str:
        """Weights by hash or name, precision, vLLM's version, the hashes of plug-in code, and that videos are given whole."""
        import vllm

        code = "".join(f":{sha256[:16]}" for sha256 in self._code) + ":videos" * self.takes_video
        return f"vllm:{vllm.__version__}:{self._hash}:{self._dtype}:{sorted(self._engine_options.items())}{code}"

    def render(self, request: Request) -> str:
        """The prompt as the model reads it, one placeholder per image. Raises `AlignmentError` when marks and images differ."""
        check_marks(request)
        if self._ours:
            from mllm.processing.chat import render_prompt

            return render_prompt(self.processor, request.turns)
        return self.processor.apply_chat_template(
            hf_messages(request.turns), tokenize=False, add_generation_prompt=True
        )

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Answers, in windows of a thousand; inside a window vLLM schedules. What one request's pictures, videos or length make
        impossible is that request's error."""
        from vllm.v1.engine.exceptions import EngineDeadError

        stream = iter(requests)
        while window := list(islice(stream, _WINDOW)):
            waiting: list[tuple[Request, str]] = []
            for request in window:
                sampling, prompt = self._sampling(request), ""
                try:
                    prompt = self.render(request)
                    self.llm.enqueue(self._input(request, prompt), sampling, use_tqdm=False)
                except EngineDeadError:
                    raise
                except Exception as error:  # foreign templates and processors raise whatever they like
                    yield Response(request.id, "", prompt, error=f"{type(error).__name__}: {error}")
                else:
                    waiting.append((request, prompt))
            outputs: Any = self.llm.wait_for_completion(use_tqdm=False)  # in the order in which they were given
            for (request, prompt), output in zip(waiting, outputs, strict=True):
                reply = output.outputs[0]
                yield Response(
                    request.id,
                    answer_text(reply.text),
                    prompt,
                    len(output.prompt_token_ids or ()),
                    len(reply.token_ids),
                    logprob=reply.cumulative_logprob,
                )

    def _input(self, request: Request, prompt: str) -> Any:
        """A request as ``vllm.LLM`` takes it."""
        ids = self._tokens(prompt)
        seen = visual_inputs(ids, request.images, self.processor, where=request.id) if request.images else {}
        return {"prompt_token_ids": ids} | seen

    def _tokens(self, prompt: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        starts = tokenizer.bos_token and prompt.startswith(tokenizer.bos_token)
        return tokenizer(prompt, add_special_tokens=not (self._ours or starts))["input_ids"]

    @staticmethod
    def _sampling(request: Request) -> Any:
        from vllm import SamplingParams

        options = dict(request.options)
        sample = options.pop("do_sample", False)
        if options.pop("num_beams", 1) != 1:
            raise UnavailableError("vLLM's generate has no beam search; set generation.num_beams=1")
        settings: dict[str, Any] = {"max_tokens": options.get("max_new_tokens", 32), "temperature": 0.0}
        if sample:
            settings |= {"temperature": options.get("temperature", 1.0), "top_p": options.get("top_p", 1.0)}
            settings["seed"] = options.get("seed", 0)
        return SamplingParams(stop=options.get("stop"), logprobs=0, **settings)
