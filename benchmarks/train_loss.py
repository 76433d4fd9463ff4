"""How much memory and time does the language-model loss take, plain and chunked?

The head and cross-entropy alone, forward and backward, at a stated vocabulary and number of supervised tokens. Prints one JSON line a
variant: peak memory above the inputs, time, loss, and the gradients' cosine with the plain ones.

    python benchmarks/train_loss.py --vocabulary 152064 --tokens 16384 --width 3584
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from mllm.models.loss import linear_cross_entropy

    return linear_cross_entropy(hidden[None], weight, labels[None], shift=False)


def measure(name: str, function, options: argparse.Namespace, device: torch.device) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(options.tokens, options.width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(options.vocabulary, options.width, device=device, generator=generator)
    weight = (weight * options.width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(options.vocabulary, (options.tokens,), device=device, generator=generator)
    times, loss, peak = [], torch.zeros(()), 0.0
    for _ in range(options.repeats):
        hidden.grad = weight.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        start = time.perf_counter()
        loss = function(hidden, weight, labels)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        times.append(time.perf_counter() - start)
    assert weight.grad is not None
    result = {
        "variant": name,
        "loss": round(float(loss.detach()), 6),
        "ms": round(1e3 * sorted(times)[len(times) // 2], 1),
        "extra_gb": round(peak / 1e9, 2) if device.type == "cuda" else None,
    }
    return result, weight.grad.double().flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--vocabulary", type=int, default=152064 if cuda else 8000)
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 1024)
    parser.add_argument("--width", type=int, default=3584 if cuda else 128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    reference = None
    for name, function in (("plain", plain), ("chunked", chunked)):
        result, gradient = measure(name, function, options, device)
        reference = gradient if reference is None else reference
        result["cosine"] = round(float(F.cosine_similarity(gradient, reference, dim=0)), 6)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
