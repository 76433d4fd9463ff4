"""Which private parts of vLLM do we override or read, and what for? Each is listed here and looked up in the installed vLLM's source.

Our scheduler and processor are subclasses of vLLM's: what they take from their parents by a private name, or by a public one that
is documented nowhere, moves without notice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Private:
    """Names that some file (glob patterns from vLLM's root; any of them) must define or set. why: what of ours stands on them.
    since: the first release that has them; older ones do without what stands on them, which our code then refuses."""

    files: tuple[str, ...]
    names: tuple[str, ...]
    why: str
    since: tuple[int, int] = (0, 0)


PRIVATE = (
    Private(
        ("v1/core/sched/scheduler.py",),
        ("_preempt_request", "_pause_state", "waiting", "running", "kv_cache_config", "kv_cache_manager"),
        "the two requests of a guided drawing stay together (mllm.serve.vllm.scheduler)",
    ),
    Private(
        ("v1/core/sched/scheduler.py",),
        ("max_num_running_reqs", "max_num_scheduled_tokens"),
        "seats and tokens that are kept for a pair (mllm.serve.vllm.scheduler)",
    ),
    Private(
        ("v1/core/sched/request_queue.py",),
        ("prepend_request", "remove_requests"),
        "pairs are put ahead of what waits (mllm.serve.vllm.scheduler)",
    ),
    Private(
        ("v1/core/kv_cache_manager.py", "v1/core/block_pool.py"),
        ("get_blocks", "watermark_blocks", "get_num_free_blocks"),
        "memory that pairs will yet need (mllm.serve.vllm.scheduler)",
    ),
    Private(
        ("multimodal/processing.py", "multimodal/processing/*.py"),
        ("_cached_apply_hf_processor", "_apply_hf_processor", "_get_mm_fields_config", "_get_prompt_updates"),
        "routed images pass by the cache of processed ones, each with its question (mllm.serve.vllm.processing)",
    ),
    Private(
        ("multimodal/processing.py", "multimodal/processing/*.py"),
        ("_get_hf_mm_inputs", "_call_hf_processor"),
        "videos come to the processor as training gives them, and its errors out in its own words (mllm.serve.vllm.processing)",
        since=(0, 31),
    ),
    Private(
        ("multimodal/video.py",),
        ("register", "load_bytes"),
        "a video's file reaches our own reader (mllm.serve.vllm.videos)",
    ),
    Private(
        ("multimodal/profiling.py", "multimodal/processing/*.py"),
        ("_get_dummy_images",),
        "memory is measured with the largest pictures (mllm.serve.vllm.processing)",
    ),
    Private(
        ("model_executor/models/interfaces.py",),
        ("_mark_tower_model", "_mark_language_model"),
        "encoders are left out where pictures are switched off (mllm.serve.vllm.model)",
    ),
    Private(
        ("model_executor/models/interfaces.py",),
        ("get_mrope_input_positions",),
        "positions on several axes are those of training (mllm.serve.vllm.positions)",
    ),
    Private(
        ("lora/ops/torch_ops/lora_ops.py",),
        ("bgmv_expand", "bgmv_expand_slice"),
        "on a CPU, rows without an adapter take none (mllm.serve.vllm.cpu_adapters)",
    ),
    Private(
        ("lora/lora_model.py",),
        ("_should_skip_module",),
        "an adapter's weights on encoders and connector are left to us (mllm.serve.vllm.visual_adapters)",
    ),
    Private(
        ("v1/engine/core_client.py",),
        ("_call_utility_async", "core_engines"),
        "statistics and choices of all data-parallel engines, not of the first alone (mllm.serve.http.stats)",
    ),
    Private(
        ("entrypoints/openai/api_server.py", "entrypoints/launchers/api_server/app_state.py"),
        ("engine_client",),
        "drawings and statistics are asked of the engine (mllm.serve.http.admission)",
    ),
)


def moved(root: Path, version: str) -> list[str]:
    """One line for every name that the vLLM in ``root`` (its package folder; version: ``0.32.0``) does not define where we
    expect it."""
    lines = []
    release = tuple(int(number) for number in version.split(".")[:2])
    for part in PRIVATE:
        if release < part.since:
            continue
        sources = [path.read_text(encoding="utf-8", errors="replace") for p in part.files for path in root.glob(p)]
        for name in part.names:
            defined = re.compile(
                rf"^\s*(?:async )?def {name}\b|\b(?:self|state)\.{name}(?::[^=\n]+)?\s*=", re.MULTILINE
            )
            if not any(defined.search(source) for source in sources):
                lines.append(f"{name} is in none of {', '.join(part.files)}: {part.why}")
    return lines
