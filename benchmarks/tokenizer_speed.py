"""How fast are a tokenizer's search, encoding, decoding and training step, and how much memory does the search take?

    python benchmarks/tokenizer_speed.py search --device cuda
    python benchmarks/tokenizer_speed.py model --recipe tokenizer_tokenflow_clipb_224 --device cuda --batch 32
    python benchmarks/tokenizer_speed.py generate --device cuda

Weights are random and images are noise: times depend on neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.models.compilation import compile_tokenizer
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.losses import TokenizerLosses
from mllm.visual_tokenizers.quantizers import search as searching
from mllm.visual_tokenizers.quantizers.search import nearest_codes
from mllm.visual_tokenizers.recipe import load_training


def measure(work: Callable[[], object], device: torch.device, *, warm: int, repeats: int) -> dict[str, float]:
    """Median and range of the seconds of one call, and the peak memory above what was held before (CUDA only)."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warm):
        work()
    synchronize()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begun)
    result = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
    if device.type == "cuda":
        result["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
    return result


def naive_search(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """All distances at once, as the published code has it."""
    distance = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.T
    return distance.argmin(1)


def kernel_forms(z: torch.Tensor, table: torch.Tensor, repeats: int) -> dict:
    """The kernel in several sizes of its blocks and precisions of its products, each with the ids that then differ."""
    kernel = searching.Launch
    usual = (kernel.positions, kernel.codes, kernel.warps, kernel.precision)
    expected, found = nearest_codes(z, table), {}
    forms = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (64, 32, 4), (32, 64, 4), (128, 128, 8)]
    for form in [usual, *((*size, precision) for precision in ("ieee", "tf32x3") for size in forms)]:
        kernel.positions, kernel.codes, kernel.warps, kernel.precision = form
        try:
            work = partial(nearest_codes, z, table)
            found[str(form)] = {
                "milliseconds": round(1e3 * measure(work, z.device, warm=2, repeats=repeats)["seconds"], 3),
                "differ": int((work() != expected).sum()),
            }
        except Exception as error:
            found[str(form)] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({str(form): found[str(form)]}), flush=True)
    kernel.positions, kernel.codes, kernel.warps, kernel.precision = usual
    return found


@torch.no_grad()
def search(arguments: argparse.Namespace, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1).to(device)  # noqa: E731
    z, table = normal(arguments.positions, arguments.dim), normal(arguments.codes, arguments.dim)
    ids = nearest_codes(z, table)
    kernels = kernel_forms(z, table, arguments.repeats) if device.type == "cuda" else {}
    searching.LARGEST_FUSED_DIM = 0  # from here on as without the kernel
    some = torch.randperm(len(z), generator=generator)[:512].to(device)
    exact = torch.cat([(row[None].double() - table.double()).square().sum(1).argmin()[None] for row in z[some]])
    result = {
        "shape": [arguments.positions, arguments.codes, arguments.dim],
        "ids_equal_fp64_reference": bool((ids[some] == exact).all()),
        "ids_that_differ_from_blocked": int((ids != nearest_codes(z, table)).sum()),
        "kernel": kernels,
        "blocked": measure(lambda: nearest_codes(z, table), device, warm=1, repeats=arguments.repeats),
        "blocked_without_refinement": measure(
            lambda: nearest_codes(z, table, refine=False), device, warm=1, repeats=arguments.repeats
        ),
        "blocked_by_scores_at_once": {
            f"2**{power}": measure(
                partial(nearest_codes, z, table, max_scores=2**power), device, warm=1, repeats=arguments.repeats
            )
            for power in ((22, 23, 25, 27) if device.type == "cuda" else ())
        },
        "scores_if_all_at_once_gib": arguments.positions * arguments.codes * 4 / 2**30,
    }
    if arguments.naive:
        result["naive"] = measure(lambda: naive_search(z, table), device, warm=1, repeats=arguments.repeats)
        result["naive_ids_that_differ"] = int((naive_search(z, table) != ids).sum())
    return result


def model(arguments: argparse.Namespace, device: torch.device) -> dict:
    recipe = load_training(arguments.recipe)
    tokenizer = build_tokenizer(recipe.tokenizer).to(device)
    if arguments.channels_last:
        tokenizer = tokenizer.to(memory_format=torch.channels_last)
    if arguments.compile:
        compile_tokenizer(tokenizer)
    size, batch = tokenizer.image.height, arguments.batch
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    result: dict = {"recipe": arguments.recipe, "batch": batch, "tokens_per_image": tokenizer.tokens_per_image}
    result |= {"channels_last": arguments.channels_last, "compiled": arguments.compile}
    autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)  # noqa: E731
    tokenizer.eval()
    with torch.no_grad(), autocast():
        codes = tokenizer.encode(pixels)
        for name, work in (("encode", lambda: tokenizer.encode(pixels)), ("decode", lambda: tokenizer.decode(codes))):
            result[name] = measure(work, device, warm=3, repeats=arguments.repeats)
            result[name]["images_per_second"] = batch / result[name]["seconds"]
    tokenizer.train()
    # The teacher and the perceptual network are left out: they need weights and are frozen forward passes.
    alone = recipe.losses.model_copy(update={"semantic": None, "adversarial": None})
    losses = TokenizerLosses(alone, tokenizer, None).to(device)
    learning = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, betas=recipe.stage.optimizer.betas)

    def step() -> None:
        with autocast():
            output = tokenizer(pixels)
            _, total = losses(output, pixels, 0)
            # Stands for the distillation loss, so that the semantic branch has its backward pass.
            total = total + sum(feature.float().square().mean() for feature in output.features.values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    result["train_step"] = measure(step, device, warm=3, repeats=arguments.repeats)
    result["train_step"]["images_per_second"] = batch / result["train_step"]["seconds"]
    return result


@torch.no_grad()
def generate(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Forward passes that drawing one image takes: scale by scale against code by code, on a Llama of 1.1B shape."""
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    scales = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    with device:
        language_model = LlamaModel(config).to(torch.bfloat16).eval()
    rows, prompt = 2 * arguments.batch, 128  # both guidance branches in one batch

    def draw(blocks: list[int]) -> None:
        cache = DynamicCache()
        language_model(
            inputs_embeds=torch.zeros(rows, prompt, config.hidden_size, device=device, dtype=torch.bfloat16),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        for block in blocks:
            x = torch.zeros(rows, block, config.hidden_size, device=device, dtype=torch.bfloat16)
            # Inside a scale every code sees every other: nothing is masked.
            mask = torch.zeros(rows, 1, block, cache.get_seq_length() + block, device=device, dtype=torch.bfloat16)
            language_model(inputs_embeds=x, past_key_values=cache, use_cache=True, attention_mask=mask)

    total = sum(s * s for s in scales)
    return {
        "batch": arguments.batch,
        "codes": total,
        "next_scale": measure(lambda: draw([s * s for s in scales[1:]]), device, warm=1, repeats=arguments.repeats),
        "one_by_one": measure(lambda: draw([1] * (total - 1)), device, warm=0, repeats=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "model", "generate"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--recipe", default="tokenizer_tokenflow_clipb_224")
    parser.add_argument("--positions", type=int, default=64 * 729)
    parser.add_argument("--codes", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=40)
    parser.add_argument("--channels-last", action="store_true", help="keep convolutions' channels last in memory")
    parser.add_argument("--compile", action="store_true", help="compile the networks, as a stage's compile: true does")
    parser.add_argument("--naive", action="store_true", help="also hold all distances at once (needs 12 GiB or more)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = {"search": search, "model": model, "generate": generate}[arguments.what](arguments, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, **result}, indent=2))


if __name__ == "__main__":
    main()
