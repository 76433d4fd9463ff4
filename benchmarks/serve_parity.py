"""Do vLLM and `generate` agree, over connectors, routers, ways of looking at a picture and vLLM's two ways of running a model? Tiny
random models, fp32, CPU.

    python benchmarks/serve_parity.py [--only mlp,mova] [--cases 54] [--tokens 16] [--backend native|transformers]

Each kind runs in a process of its own, one vLLM engine at a time; a table of equal prompts is printed, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

MARKS = {"begin": "<vision>", "row": "<vrow_sep>", "end": "</vision>"}
KINDS: dict[str, dict] = {
    "mlp": {"connector": {"type": "mlp"}, "encoders": ["clip"]},
    "channel_concat": {
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
        "encoders": ["clip", "timm"],
    },
    "sequence_concat": {"connector": {"type": "sequence_concat"}, "encoders": ["clip", "timm"]},
    "pixel_shuffle": {"connector": {"type": "pixel_shuffle"}, "encoders": ["clip"]},
    "resampler": {"connector": {"type": "resampler"}, "encoders": ["clip", "dinov2"]},
    "spatial_aggregator": {"connector": {"type": "spatial_aggregator", "grid": [2, 4]}, "encoders": ["clip", "timm"]},
    "linear": {"connector": {"type": "linear"}, "encoders": ["dinov2"]},
    "interleave": {"connector": {"type": "interleave"}, "encoders": ["clip", "timm"]},
    "average_pool": {"connector": {"type": "average_pool", "grid": [2, 2]}, "encoders": ["timm"]},
    "merv": {"connector": {"type": "merv", "grid": [2, 2], "hidden": 12}, "encoders": ["clip", "timm"]},
    "come_vl": {
        "connector": {
            "type": "come_vl",
            "layers": {"clip_layers": 2, "dinov2_layers": 2},
            "pool_heads": 2,
            "num_heads": 2,
        },
        "encoders": ["clip_layers", "dinov2_layers"],
    },
    "attention_bias": {
        "connector": {"type": "attention_bias", "attention_heads": 2, "num_heads": 4, "bias_hidden": 6},
        "encoders": ["clip", "dinov2"],
    },
    "mova_fixed": {
        "connector": {"type": "mova"},
        "encoders": ["clip", "timm", "dinov2"],
        "router": {"type": "constant", "experts": ["timm", "dinov2"]},
    },
    "language_model": {
        "connector": {"type": "mova"},
        "encoders": ["clip", "timm", "dinov2"],
        "router": {
            "type": "language_model",
            "experts": ["timm", "dinov2"],
            "capabilities": {"timm": "Reads text.", "dinov2": "Finds objects."},
            "parser": "lenient",
        },
    },
    **{
        f"backbones_{group}": {"connector": {"type": "sequence_concat"}, "encoders": names}
        for group, names in {
            "pyramids": ["biformer", "crossformer", "vssd", "unitranspose", "dualtokenvit", "ddrnet"],
            "vits": ["channelvit", "crossvit", "unit", "lookupvit", "dependencyvit", "vir", "evitpose", "uni4eye"],
            "hybrids": ["duoformer", "dynperceiver", "snnet", "s4d", "paratranscnn", "samunet", "dbsam"],
        }.items()
    },
    "rgb_depth": {"connector": {"type": "linear"}, "encoders": ["gldmnet"]},
    "native_siglip2": {
        "connector": {"type": "pixel_shuffle", "factor": 2},
        "encoders": ["siglip2"],
        "views": {"type": "native", "max_patches": 40, "newlines": True},
    },
    "native_qwen_vl": {
        "connector": {"type": "linear"},
        "encoders": ["qwen_vl"],
        "views": {"type": "native", "rule": "qwen", "max_patches": 20, "max_sample_tokens": 40},
    },
    "native_two": {
        "connector": {"type": "resampler"},
        "encoders": ["siglip2", "patches"],
        "views": {"type": "native", "max_patches": 30},
    },
    "native_without_encoder": {
        "connector": {"type": "linear"},
        "encoders": [],
        "views": {"type": "native", "rule": "solo", "patch_size": 8, "max_side": 48, "marks": MARKS},
    },
    "tiles_llava_next": {
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
        "encoders": ["clip", "timm"],
        "views": {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]], "thumbnail_only": ["timm"]},
    },
    "tiles_internvl": {
        "connector": {"type": "pixel_shuffle", "factor": 2},
        "encoders": ["clip"],
        "views": {"type": "tiles", "dialect": "internvl", "max_tiles": 6, "max_sample_tokens": 64},
    },
    "dual_perspective": {
        "connector": {"type": "dual_perspective"},
        "encoders": ["clip"],
        "views": {"type": "dual_perspective", "n": 2},
    },
    "multi_scale": {
        "connector": {"type": "multi_scale"},
        "encoders": ["dinov2"],
        "views": {"type": "multi_scale", "scales": [1, 2]},
    },
    "gate": {
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
        "encoders": ["clip", "timm", "dinov2"],
        "router": {"type": "gate", "experts": ["timm", "dinov2"], "hidden": 16},
    },
}


def build(kind: str, folder: str):
    """Write a tiny checkpoint of one kind whose every encoder moves the logits."""
    import torch

    from tests.helpers import TINY_CLIP, TINY_LLM, TINY_TIMM, tiny_model

    library = {
        "clip": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "hidden_size": 64}},
        "timm": dict(TINY_TIMM),
        "dinov2": {
            "type": "hf",
            "architecture": {
                "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 7,
            },
            "layers": [-1],
            "keep_prefix": True,
        },
        "siglip2": {
            "type": "hf",
            "architecture": {
                "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_patches": 16, "patch_size": 8,
            },
        },
        "qwen_vl": {
            "type": "qwen_vl",
            "architecture": {
                "model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                "out_hidden_size": 24, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
            },
        },
        "patches": {"type": "raw_patches", "image_size": 32, "patch_size": 8},
    }  # fmt: skip
    from mllm.encoders import ENCODERS

    for name in ("clip", "dinov2"):  # every layer of it
        library[f"{name}_layers"] = {**library[name], "layers": [-2, -1], "keep_prefix": False}
    spec = KINDS[kind]
    for name in spec["encoders"]:  # research backbones by their type, at their smallest
        if name not in library:
            library[name] = {**ENCODERS.get(name).tiny(), "keep_prefix": False}
    tokenizer = str(Path(folder) / "tokenizer")
    changes = {"encoders": {name: library[name] for name in spec["encoders"]}, "connector": spec["connector"]}
    changes |= {key: spec[key] for key in ("router", "views") if key in spec}
    changes["language_model"] = {"config": {**TINY_LLM, "max_position_embeddings": 2048}, "tokenizer": tokenizer}
    model, processor = tiny_model(tokenizer, seed=3, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                wide = 0.3 if "embed_tokens" in name or "lm_head" in name else 1.2 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * wide)
            elif "gate" in name and not parameter.any():
                parameter.fill_(0.7)  # a connector that begins without its second encoder
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def one(kind: str, arguments: argparse.Namespace) -> dict:
    """Build, run both sides, compare; one engine."""
    import torch

    torch.set_num_threads(1)
    from mllm.serve.parity import run_parity

    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        build(kind, folder)
        from transformers import AutoProcessor

        from mllm.serve.parity import standard_cases

        experts = KINDS[kind].get("router", {}).get("experts", [])
        processor = AutoProcessor.from_pretrained(folder)
        panels = max(spec.panels for spec in processor.image_processor.specs.values())
        cases = standard_cases(arguments.cases, experts=experts, panels=panels)
        if arguments.backend == "transformers" and KINDS[kind].get("router"):
            for case in cases:
                case.experts = [experts[0]] if case.experts is None and case.images else case.experts
        differences, moved = run_parity(
            folder,
            cases,
            num_tokens=arguments.tokens,
            device="cpu",
            model_impl={"native": "vllm"}.get(arguments.backend, arguments.backend),
            engine={"block_size": 32, "max_model_len": 2048},
        )
        del processor
    rows = {}
    for path in dict.fromkeys(d.path for d in differences):
        chosen = [d for d in differences if d.path == path]
        rows[path] = {
            "equal": sum(d.same for d in chosen),
            "of": len(chosen),
            "largest_gap": max(d.gap for d in chosen),
            "different": [f"{d.case}: first {d.first}, {'; '.join(d.notes)}" for d in chosen if not d.same][:4],
        }
    return {
        "kind": kind,
        "backend": arguments.backend,
        "moved": moved,
        "paths": rows,
        "seconds": round(time.time() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--cases", type=int, default=54)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--backend", default="native", choices=["native", "transformers"])
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inner:
        print("RESULT " + json.dumps(one(arguments.only, arguments)))
        return
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }
    results = []
    for kind in arguments.only.split(","):
        command = [sys.executable, __file__, "--inner", "--only", kind, "--cases", str(arguments.cases)]
        command += ["--tokens", str(arguments.tokens), "--backend", arguments.backend]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        line = next((x for x in run.stdout.splitlines() if x.startswith("RESULT ")), None)
        result = json.loads(line[7:]) if line else {"kind": kind, "error": run.stderr[-3000:]}
        results.append(result)
        if line is None:
            print(f"{kind}: FAILED\n{result['error']}", flush=True)
            continue
        weakest = min(result["moved"].values(), default=float("nan"))
        for path, row in result["paths"].items():
            print(
                f"{kind:20} {path:28} equal {row['equal']}/{row['of']}  gap {row['largest_gap']:.1e}  "
                f"weakest encoder moves {weakest:.2f}  {row['different']}",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
