"""Which way of running routed encoders comes closest to paying only for what runs? Random weights, bf16, JSON lines; a CUDA GPU.

Base and 4 experts, all ViT-L at 336 px: eager; a CUDA graph of each encoder and number of pictures, as serving has; the same with each
expert on a stream of its own; eager on streams; compiled layers. ``of base + k`` is `ideal` of routing_h200.py over a way's time, by the
eager times and by the way's own.

    python benchmarks/routing_ways.py                                          # one GPU, about a minute
    python benchmarks/routing_ways.py --device cpu --tiny --batch 4 --repeats 1   # checks the script: graphs and streams are left out
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.routing_h200 import EXPERTS, fill, median_seconds, show, uniform, vit
from mllm.models.pipeline import EncoderBank
from mllm.serve.vllm.encoder_graphs import EncoderGraphs, compile_encoders

WAYS = ("eager", "graphs on streams", "graphs", "eager on streams", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="small encoders in fp32, to try the script")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    show(what="machine", device=name, torch=torch.__version__, batch=options.batch)
    reference, eager = None, None
    with torch.inference_mode():
        for way in options.ways:
            try:
                row, features = measure(options, way)
            except Exception as error:  # the other ways are still to be measured
                show(way=way, error=f"{type(error).__name__}: {str(error)[:300]}")
                continue
            reference = features if reference is None else reference
            eager = eager or (row["base_ms"], row["expert_ms"])
            for key in [key for key in row if key.startswith("k=")]:
                row[f"{key}, of base + k, eager"] = (eager[0] + int(key[2]) * eager[1]) / row[key]
            show(**row, differs_by=float((features - reference).norm() / reference.norm()))


def measure(options: argparse.Namespace, way: str) -> tuple[dict[str, Any], Tensor]:
    """Times of one way in ms, and its features at k = 1, end to end."""
    device, cuda = torch.device(options.device), options.device == "cuda"
    pixels_of_one, dtype = (56, torch.float32) if options.tiny else (336, torch.bfloat16)
    torch.manual_seed(0)
    with device:
        encoders = {name: vit(pixels_of_one, options.tiny) for name in ("base", *EXPERTS)}
        bank = EncoderBank(encoders, {"type": "gate", "experts": list(EXPERTS), "top_k": 2}, text_width=512)
    fill(bank, device, dtype)
    bank.eval()
    side = (options.batch, 3, pixels_of_one, pixels_of_one)
    pixels = {name: torch.randn(*side, device=device, dtype=dtype) for name in bank.infos}
    text = torch.randn(options.batch, 512, device=device, dtype=dtype)
    if way == "compiled":
        compile_encoders(bank.encoders)  # pyright: ignore[reportArgumentType]
    if cuda and "graphs" in way:
        for name, encoder in bank.encoders.items():  # each with memory of its own, so that replays may run at once
            EncoderGraphs({name: encoder}, options.batch).install()
    if cuda and "streams" in way:
        put_on_streams(bank)

    def timed(run: Any) -> float:
        return 1e3 * median_seconds(run, device, options.repeats)

    base = timed(lambda: bank.encode_base(pixels))
    expert = statistics.fmean(timed(lambda e=e: bank.encode_expert(e, pixels[e])) for e in EXPERTS[:2])
    row: dict[str, Any] = {"way": way, "base_ms": base, "expert_ms": expert}
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2):
        chosen = torch.rand(options.batch, len(EXPERTS), generator=generator).topk(k).indices
        spread = torch.zeros(options.batch, len(EXPERTS)).scatter_(1, chosen, 1.0 / k)
        for kind, weights in (("even", uniform(options.batch, k)), ("random", spread)):
            weights = weights.to(device)
            row[f"k={k}, {kind}"] = timed(lambda w=weights: bank(pixels, expert_weights=w, text=text))
            row[f"of its own base + k, k={k}, {kind}"] = (base + k * expert) / row[f"k={k}, {kind}"]
    found = bank(pixels, expert_weights=uniform(options.batch, 1).to(device), text=text)[0]
    return row, torch.cat([found[name].tokens.float().flatten() for name in sorted(found)])


def put_on_streams(bank: EncoderBank) -> None:
    """Run each expert on a CUDA stream of its own, after what the current one has done and before what it does next."""
    streams = {name: torch.cuda.Stream() for name in bank.experts}
    routed, experts = bank._encode_routed, bank._encode_experts

    def beside(name: str, *arguments: Any) -> Any:
        streams[name].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[name]):
            return routed(name, *arguments)

    def all_of_them(*arguments: Any) -> Any:
        found = experts(*arguments)
        for stream in streams.values():
            torch.cuda.current_stream().wait_stream(stream)
        return found

    bank._encode_routed, bank._encode_experts = beside, all_of_them


if __name__ == "__main__":
    main()
