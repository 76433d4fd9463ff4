"""How fast is our TokenFlow tokenizer beside the module that its authors published, on the same GPU and inputs?

Nothing of the authors' code is part of this project: ``--authors DIR`` is yours and holds the folder ``tokenflow`` of their repository
(github.com/ByteVisionLab/TokenFlow); needed are tokenizer/vq_model.py, vqkd_model.py, norm_ema_quantizer.py and clip/model.py, and einops
and timm. Random weights on both sides, bf16 by autocast, no gradients: the time to encode pictures to codes, and to decode codes to pixels.
The authors' decode also computes the semantic branch, so their pixel branch is timed alone as well. ``--compile`` times ours a second time
with compiled networks (`mllm tokenizer encode --compile`), counts the codes that differ, and times theirs compiled too.

    python benchmarks/tokenizer_authors.py --authors /path/to/TokenFlow            # one GPU, under a minute
    python benchmarks/tokenizer_authors.py --authors DIR --device cpu --batch 2 --repeats 2   # checks the script
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.tokenizer_speed import measure
from mllm.models.compilation import compile_tokenizer
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.recipe import load_training

TEACHERS = {"tokenizer_tokenflow_clipb_224": "clipb_224"}


def authors_model(folder: Path, teacher: str) -> Any:
    """The authors' tokenizer with random weights: their loader of CLIP's file is left out, its network is their own."""
    import transformers.modeling_utils as modeling

    for name, read in (
        ("get_parameter_device", "device"),
        ("get_parameter_dtype", "dtype"),
    ):  # gone from newer transformers
        if not hasattr(modeling, name):
            setattr(modeling, name, lambda model, read=read: getattr(next(model.parameters()), read))
    sys.path.insert(0, str(folder))
    package = "tokenflow.tokenizer.clip"
    for name in ("tokenflow", "tokenflow.tokenizer", package):
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    vision = importlib.import_module(f"{package}.model").VisionTransformer
    loader = types.SimpleNamespace(
        load_clip_vision=lambda *_, **__: vision(
            input_resolution=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512
        )
    )
    sys.modules[package].clip = loader  # type: ignore[attr-defined]
    published = importlib.import_module("tokenflow.tokenizer.vq_model")
    arguments = published.ModelArgs(codebook_size=32768, teacher=teacher)
    return published.TokenFlow(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, help="folder that holds their tokenflow/")
    parser.add_argument("--recipe", default="tokenizer_tokenflow_clipb_224", choices=tuple(TEACHERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also with compiled networks, ours and theirs")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    ours = build_tokenizer(load_training(options.recipe).tokenizer).to(device).eval()
    theirs = authors_model(options.authors, TEACHERS[options.recipe]).to(device).eval()
    size, batch = ours.image.height, options.batch
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def pixels_alone(quantized: torch.Tensor) -> torch.Tensor:
        return theirs.decoder(theirs.post_quant_conv(quantized[:, theirs.semantic_code_dim :]))

    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        codes = ours.encode(pixels)
        ours_pixels = ours.decode(codes)
        quantized, _, published = theirs.encode(pixels)
        works = {
            "ours, encode": lambda: ours.encode(pixels),
            "authors', encode": lambda: theirs.encode(pixels),
            "ours, decode": lambda: ours.decode(codes),
            "authors', decode (pixels and semantic branch)": lambda: theirs.decode_code(published),
            "authors', pixel branch alone": lambda: pixels_alone(quantized),
        }
        found = {}
        for name, work in works.items():
            found[name] = measure(work, device, warm=3, repeats=options.repeats)
            found[name]["images_per_second"] = round(batch / found[name]["seconds"], 3)
            print(json.dumps({name: found[name]}), flush=True)
        if options.compile:
            compile_tokenizer(ours)
            for part in (theirs.encoder, theirs.decoder):
                part.compile()
            works = {
                "ours compiled, encode": lambda: ours.encode(pixels),
                "ours compiled, decode": lambda: ours.decode(codes),
                "authors' pixel networks compiled, encode": lambda: theirs.encode(pixels),
                "authors' pixel branch alone compiled": lambda: pixels_alone(quantized),
            }
            for name, work in works.items():
                found[name] = measure(work, device, warm=3, repeats=options.repeats)
                found[name]["images_per_second"] = round(batch / found[name]["seconds"], 3)
                print(json.dumps({name: found[name]}), flush=True)
            again = ours.encode(pixels).codes["shared"]
            print(json.dumps({
                "codes that differ from uncompiled, share": float((again != codes.codes["shared"]).float().mean()),
                "pixels, largest and mean difference of decoding": [
                    float((ours.decode(codes) - ours_pixels).abs().max()), float((ours.decode(codes) - ours_pixels).abs().mean())
                ],
            }))  # fmt: skip
    rate = {name: value["images_per_second"] for name, value in found.items()}
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "batch": batch,
                "codes per image, ours and theirs": [ours.tokens_per_image, int(published.shape[1])],
                "encode, times the authors'": round(rate["ours, encode"] / rate["authors', encode"], 2),
                "decode, times the authors' pixel branch": round(
                    rate["ours, decode"] / rate["authors', pixel branch alone"], 2
                ),
                **(
                    {
                        "compiled: encode, times the authors'": round(
                            rate["ours compiled, encode"] / rate["authors', encode"], 2
                        ),
                        "compiled: decode, times the authors' pixel branch": round(
                            rate["ours compiled, decode"] / rate["authors', pixel branch alone"], 2
                        ),
                    }
                    if options.compile
                    else {}
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
