"""How close does routed inference come to paying only for what runs? Random weights, bf16, JSON lines; a CUDA GPU.

    python benchmarks/routing_h200.py                  # base + 4 experts, all ViT-L at 336 px, batch 32; under 3 minutes
    python benchmarks/routing_h200.py --tiny --device cpu   # the same code on small encoders

``ideal`` is the time of the base encoder and k experts, each on the whole batch: what a model without routing, with these k
experts only, would take. Under uniform routing the routed model encodes as many pictures, in 4 groups of a quarter of k batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.connectors.build import build_connector, connector_config
from mllm.models.compilation import repeated_layers
from mllm.models.pipeline import EncoderBank
from mllm.types import Routing

EXPERTS = ("first", "second", "third", "fourth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--width", type=int, default=4096, help="language model's width")
    parser.add_argument("--compile", action="store_true", help="compile each encoder layer (adds about a minute)")
    parser.add_argument("--tiny", action="store_true", help="small encoders in fp32, to try the script")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    show(
        what="machine",
        device=name,
        torch=torch.__version__,
        batch=options.batch,
        dtype=str(dtype),
        compiled=options.compile,
    )
    with torch.inference_mode():
        measure(options, device, dtype, base_pixels=56 if options.tiny else 336)
        if not options.tiny:
            measure(options, device, dtype, base_pixels=672, label="base at 672 px, as in MoVA")


def measure(
    options: Any, device: torch.device, dtype: torch.dtype, *, base_pixels: int, label: str = "base at 336 px"
) -> None:
    """All lines for one size of the base encoder."""
    expert_pixels = 56 if options.tiny else 336
    with device:  # made where they run: five ViT-L on a CPU take a minute
        bank = EncoderBank(
            {"base": vit(base_pixels, options.tiny), **{e: vit(expert_pixels, options.tiny) for e in EXPERTS}},
            {"type": "gate", "experts": list(EXPERTS), "top_k": 2},
            text_width=options.width,
        )
        connector = build_connector(connector_config({"type": "mova", "base": "base"}), bank.infos, options.width)
    for module in (bank, connector):
        fill(module, device, dtype)
        module.eval()
    if options.compile:
        for encoder in bank.encoders.values():
            for layer in repeated_layers(encoder):
                layer.compile()
    batch = options.batch
    pixels = {
        n: torch.randn(batch, 3, i.image.height, i.image.width, device=device, dtype=dtype)
        for n, i in bank.infos.items()
    }
    text = torch.randn(batch, options.width, device=device, dtype=dtype)

    def timed(run: Callable[[], Any]) -> float:
        return median_seconds(run, device, options.repeats)

    base = timed(lambda: bank.encode_base(pixels))
    expert = statistics.fmean(timed(lambda e=e: bank.encode_expert(e, pixels[e])) for e in EXPERTS[:2])
    show(what="encoders", label=label, base_ms=1e3 * base, expert_ms=1e3 * expert, images_per_second_base=batch / base)
    everything = torch.full((batch, len(EXPERTS)), 1 / len(EXPERTS), device=device)
    for k, weights in {1: uniform(batch, 1), 2: uniform(batch, 2), 4: everything}.items():
        weights = weights.to(device)
        encode = timed(lambda w=weights: bank(pixels, expert_weights=w, text=text))
        whole = timed(lambda w=weights: joined(bank, connector, pixels, w, text))
        ideal = base + k * expert
        show(
            what="routed" if k < len(EXPERTS) else "run everything",
            label=label,
            k=k,
            encode_ms=1e3 * encode,
            ideal_ms=1e3 * ideal,
            of_ideal=ideal / encode,
            images_per_second=batch / encode,
            images_per_second_ideal=batch / ideal,
            with_adapter_ms=1e3 * whole,
            adapter_share=1 - encode / whole,
        )
    # Uneven groups, and the gate asked as well: what a real batch does.
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2):
        chosen = torch.rand(batch, len(EXPERTS), generator=generator).topk(k).indices
        weights = torch.zeros(batch, len(EXPERTS)).scatter_(1, chosen, 1.0 / k).to(device)
        encode = timed(lambda w=weights: bank(pixels, expert_weights=w, text=text))
        show(
            what="random routing",
            label=label,
            k=k,
            groups=weights.gt(0).sum(0).tolist(),
            encode_ms=1e3 * encode,
            of_ideal=(base + k * expert) / encode,
        )
    asked = timed(lambda: bank(pixels, text=text))
    counts = bank(pixels, text=text)[1].weights.gt(0).sum(0).tolist()
    show(
        what="gate decides",
        label=label,
        k=2,
        groups=counts,
        encode_ms=1e3 * asked,
        of_ideal=(base + 2 * expert) / asked,
    )
    if device.type == "cuda":
        show(what="memory", label=label, gigabytes=torch.cuda.max_memory_allocated(device) / 1e9)


def vit(pixels: int, tiny: bool) -> dict[str, Any]:
    """ViT-L/14, or a small one."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = {"model_type": "clip_vision_model", "image_size": pixels, "patch_size": 14, **sizes}
    return {"type": "hf", "architecture": architecture, "image_size": pixels, "layers": [-1]}


def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights, made on the device."""
    module.to(device=device, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def uniform(batch: int, k: int) -> Tensor:
    """Weights ``(B, E)``: every expert on the same number of pictures."""
    weights = torch.zeros(batch, len(EXPERTS))
    for j in range(k):
        weights[torch.arange(batch), (torch.arange(batch) + j) % len(EXPERTS)] = 1 / k
    return weights


def joined(bank: EncoderBank, connector: nn.Module, pixels: dict[str, Tensor], weights: Tensor, text: Tensor) -> Tensor:
    features, routing = bank(pixels, expert_weights=weights, text=text)
    assert isinstance(routing, Routing)
    return connector(features, routing, text)


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall time of one call, the device drained before and after."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def show(**values: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


if __name__ == "__main__":
    main()
