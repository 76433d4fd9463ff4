"""How fast does vLLM serve two encoders and a 7B, beside its own one-encoder LLaVA-7B? One GPU, random weights, no
downloads.

    python benchmarks/serve_h200.py [--budget 520] [--sections hf,ours_graphs,llava_graphs,ours_eager,llava_eager]

128 requests of one 640×480 picture (576 visual tokens) and a short question, 64 new tokens each, all sent at once;
caches off; three passes, best of the last two. ``ours``: CLIP-L/336 + DINOv2-L on channels. ``hf``: the same
checkpoint through `generate`, batches of 32, and greedy tokens of 16 prompts for the bf16 agreement that
``ours_graphs`` and ``ours_eager`` report: share of equal tokens up to the first difference, and the reference's
log-probability gap between the two tokens there. ``ours_cached``: caches on, 8 pictures asked again and again.
``--small`` runs everything with a tiny model, to try the script itself.

Every section is a process of its own; one JSON line each, printed as it ends; a section that fails prints its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECTIONS = ["hf", "noise", "ours_graphs", "llava_graphs", "ours_eager", "llava_eager", "ours_cached"]
REQUESTS, NEW_TOKENS, CHECKED = 128, 64, 16
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
DINO = {
    "model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32064, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = {
    "clip": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2},
    "dino": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def shapes(small: bool) -> tuple[dict, dict, dict]:
    """CLIP, DINOv2 and Llama settings."""
    if not small:
        return CLIP, DINO, LLAMA
    return CLIP | SMALL["clip"], DINO | SMALL["dino"], LLAMA | SMALL["llama"]


def questions() -> list[str]:
    return [f"question {index}: what can be seen in this picture, and where is it?" for index in range(REQUESTS)]


def pictures(count: int, seed: int) -> list:
    """Distinct 640×480 pictures, smooth like photographs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480)) for _ in range(count)]


def write_ours(folder: Path, small: bool, device: str):
    """Model with random weights, built on the device, and its processor; written to disk."""
    import torch

    from mllm.models.build import build_config, build_processor
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.recipe import ModelSpec
    from tests.helpers import tiny_tokenizer

    clip, dino, llama = shapes(small)
    tokenizer = tiny_tokenizer()
    spec = ModelSpec.model_validate(
        {
            "language_model": {"config": {"model_type": "llama", **llama}},
            "encoders": {
                "semantic": {"type": "hf", "architecture": clip, "layers": [-2], "final_norm": False},
                "spatial": {"type": "hf", "architecture": dino, "image_size": 336, "layers": [-1]},
            },
            "connector": {"type": "channel_concat", "projector": {"depth": 2}},
            "chat_template": "chatml",
        }
    )
    config = build_config(spec, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    config.dtype = torch.bfloat16
    processor = build_processor(spec, config, tokenizer)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = MllmForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # sharper logits than a fresh initialisation has, else bf16 decides every token
        model.lm_head.weight.mul_(4.0)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.image_processor.resampler = "torch"  # as vLLM's LLaVA resizes; PIL costs 7 ms a picture
    processor.save_pretrained(folder)
    return model, processor


def write_llava(folder: Path, small: bool) -> None:
    """Config and processor of vLLM's own LLaVA-7B; its weights are made by ``load_format=dummy``."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    from tests.helpers import tiny_tokenizer

    clip, _, llama = shapes(small)
    tokenizer = tiny_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in clip.items() if k != "model_type"}),
        text_config=LlamaConfig(**llama),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def prompt_ids(tokenizer) -> list[list[int]]:
    """The same prompts for every engine, one placeholder each."""
    texts = [f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions()]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def section_hf(work: Path, small: bool) -> dict:
    """Write the checkpoint; `generate` at batch 32; reference tokens and log probabilities."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    model, processor = write_ours(work / "ours", small, device)
    written = time.perf_counter() - started
    ids, images = prompt_ids(processor.tokenizer), pictures(REQUESTS, 0)
    per_image = processor.num_image_tokens
    image_id = processor.image_token_id

    def inputs(chosen: list[int]) -> dict:
        rows = [[x for t in ids[i] for x in ([t] * per_image if t == image_id else [t])] for i in chosen]
        longest = max(map(len, rows))
        pad = processor.tokenizer.pad_token_id
        pixels = processor.image_processor([images[i] for i in chosen], return_tensors="pt")
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device),
            "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device),
            **{k: v.to(device, torch.bfloat16) for k, v in pixels.items()},
        }

    reference = []
    for index in range(CHECKED):
        output = model.generate(
            **inputs([index]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
            suppress_tokens=[image_id], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, -NEW_TOKENS:].tolist()
        top = [step[0].float().log_softmax(-1).topk(20) for step in output.logits]
        reference.append(
            {"tokens": tokens, "top": [dict(zip(map(str, t.indices.tolist()), t.values.tolist())) for t in top]}
        )
    (work / "reference.json").write_text(json.dumps(reference))
    seconds = []
    size = 32
    for _ in range(3):
        started = time.perf_counter()
        for first in range(0, REQUESTS, size):
            model.generate(
                **inputs(list(range(first, first + size))),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            if small:
                break
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    count = size if small else REQUESTS
    return {
        "written_s": round(written, 1),
        "passes_s": _round(seconds),
        "requests_per_s": round(count / min(seconds[1:]), 2),
    }


def section_engine(name: str, work: Path, small: bool) -> dict:
    """One vLLM engine: three passes, and agreement where it is ours."""
    ours, eager, cached = name.startswith("ours"), name.endswith("eager"), name.endswith("cached")
    folder = work / ("ours" if ours else "llava")
    if not ours:
        write_llava(folder, small)
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    settings: dict = {"dtype": "bfloat16", "max_model_len": 2048, "gpu_memory_utilization": 0.85, "max_num_seqs": 256}
    if small:
        settings |= {"dtype": "float32", "block_size": 32}
        settings.pop("gpu_memory_utilization")
    if not ours or not list(folder.glob("*.safetensors")):
        settings["load_format"] = "dummy"
    if not cached:
        settings |= {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    llm = LLM(
        str(folder), enforce_eager=eager or small, limit_mm_per_prompt={"image": 1}, seed=0, max_logprobs=20, **settings
    )
    loaded = time.perf_counter() - started
    ids = prompt_ids(llm.get_tokenizer())
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    count = 8 if small else REQUESTS
    seconds = []
    for number in range(3):
        images = pictures(8, 0) * (REQUESTS // 8) if cached else pictures(REQUESTS, 10 + number)
        prompts = [{"prompt_token_ids": ids[i], "multi_modal_data": {"image": images[i]}} for i in range(count)]
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        assert all(len(o.outputs[0].token_ids) == NEW_TOKENS for o in outputs)
    result = {
        "loaded_s": round(loaded, 1),
        "load_format": settings.get("load_format", "auto"),
        "prompt_tokens": len(outputs[0].prompt_token_ids),
        "passes_s": _round(seconds),
        "requests_per_s": round(count / min(seconds[1:]), 2),
        "tokens_per_s": round(count * NEW_TOKENS / min(seconds[1:]), 1),
    }
    if ours and "load_format" not in settings and (work / "reference.json").exists():
        try:
            result["agreement"] = agreement(llm, work, ids)
        except Exception as error:  # a result without agreement is still a result
            result["agreement_error"] = f"{type(error).__name__}: {error}"[:500]
    if ours:
        try:
            result["prepare_ms_per_picture"] = preparation_time(folder)
        except Exception as error:
            result["prepare_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def agreement(llm, work: Path, ids: list[list[int]]) -> dict:
    """Greedy tokens against the reference, alone and in a batch."""
    from vllm import SamplingParams

    reference = json.loads((work / "reference.json").read_text())
    image_id = next(
        t for t in ids[0] if ids[0].count(t) == 1 and llm.get_tokenizer().convert_ids_to_tokens(t) == "<image>"
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=20,
        logit_bias={image_id: -100.0},
    )
    images = pictures(REQUESTS, 0)
    prompts = [{"prompt_token_ids": ids[i], "multi_modal_data": {"image": images[i]}} for i in range(len(reference))]
    found = {}
    for mode in ("alone", "batch"):
        groups = [[p] for p in prompts] if mode == "alone" else [prompts]
        outputs = [o for group in groups for o in llm.generate(group, sampling, use_tqdm=False)]
        agreed, gaps, first_gaps = 0, [], []
        for known, output in zip(reference, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            first = next((i for i, (a, b) in enumerate(zip(known["tokens"], tokens)) if a != b), NEW_TOKENS)
            agreed += first
            for step in range(first):
                theirs, mine = known["top"][step], output.outputs[0].logprobs[step]
                gaps += [abs(theirs[str(t)] - e.logprob) for t, e in mine.items() if str(t) in theirs]
            if first < NEW_TOKENS:
                theirs = known["top"][first]
                first_gaps.append(
                    theirs[str(known["tokens"][first])] - theirs.get(str(tokens[first]), min(theirs.values()))
                )
        found[mode] = {
            "prompts": len(reference),
            "identical": sum(
                list(o.outputs[0].token_ids) == k["tokens"] for k, o in zip(reference, outputs, strict=True)
            ),
            "share_of_tokens_before_first_difference": round(agreed / (len(reference) * NEW_TOKENS), 4),
            "largest_logprob_gap_before": round(max(gaps, default=0.0), 4),
            "reference_gap_at_first_difference": {
                "max": round(max(first_gaps, default=0.0), 4),
                "all": _round(first_gaps),
            },
        }
    return found


def preparation_time(folder: Path) -> float:
    """Milliseconds on one CPU core for one picture."""
    from transformers import AutoProcessor

    processor, images = AutoProcessor.from_pretrained(folder), pictures(8, 3)
    processor.image_processor(images[:1], return_tensors="pt")
    started = time.perf_counter()
    for image in images:
        processor.image_processor([image], return_tensors="pt")
    return round((time.perf_counter() - started) / len(images) * 1000, 2)


def section_noise(work: Path, small: bool) -> dict:
    """How far bf16 itself is from fp32 on this checkpoint: the same reference prompts through the fp32 model."""
    import torch
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    processor = AutoProcessor.from_pretrained(work / "ours")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MllmForConditionalGeneration.from_pretrained(work / "ours", dtype=torch.float32).to(device).eval()
    reference = json.loads((work / "reference.json").read_text())
    ids, images = prompt_ids(processor.tokenizer), pictures(CHECKED, 0)
    equal, gaps = 0, []
    for index, row in enumerate(reference):
        expanded = [
            x for t in ids[index] for x in ([t] * processor.num_image_tokens if t == processor.image_token_id else [t])
        ]
        pixels = {k: v.to(device) for k, v in processor.image_processor([images[index]], return_tensors="pt").items()}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([expanded], device=device), **pixels, logits_to_keep=1).logits[0, -1]
        logits[processor.image_token_id] = -float("inf")
        probabilities = logits.float().log_softmax(-1)
        equal += int(probabilities.argmax()) == row["tokens"][0]
        gaps += [
            abs(float(probabilities[int(token)]) - value) for token, value in row["top"][0].items() if value > -1e9
        ]
    return {
        "prompts": len(reference),
        "bf16 and fp32 first greedy token equal": equal,
        "largest difference of a top-20 log probability": round(max(gaps), 3),
    }


def _round(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def register_plugin(work: Path) -> None:
    """Let vLLM find our entry point without an installation: package metadata beside the sources, on PYTHONPATH."""
    info = work / "site" / "mllm-0.1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mllm\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmllm = mllm.serve.vllm_plugin:register\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds; sections that would begin later are left out"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/serve_h200"))
    parser.add_argument("--out", type=Path, default=None, help="also write the results here")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.inner:
        try:
            engine = partial(section_engine, arguments.inner)
            run = {"hf": section_hf, "noise": section_noise}.get(arguments.inner, engine)
            result = run(arguments.work, arguments.small)
        except BaseException:
            result = {"error": traceback.format_exc()[-3000:]}
        print("RESULT " + json.dumps(result), flush=True)
        return
    register_plugin(arguments.work)
    paths = [str(arguments.work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PYTHONPATH": ":".join(p for p in paths if p),
    }
    started = time.perf_counter()
    results: dict[str, dict] = {}
    for name in arguments.sections.split(","):
        left = arguments.budget - (time.perf_counter() - started)
        if left < 30:
            results[name] = {"error": "left out: no time left"}
        else:
            command = [sys.executable, __file__, "--inner", name, "--work", str(arguments.work)]
            command += ["--small"] if arguments.small else []
            results[name] = run_section(command, environment, left, arguments.work / f"{name}.log")
        results[name]["at_s"] = round(time.perf_counter() - started, 1)
        print(f"RESULT {name} {json.dumps(results[name])}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))
    rates = {name: r.get("requests_per_s") for name, r in results.items()}
    ratios = {}
    for kind in ("graphs", "eager"):
        mine, theirs = rates.get(f"ours_{kind}"), rates.get(f"llava_{kind}")
        if mine and theirs:
            ratios[f"ours_over_llava_{kind}"] = round(mine / theirs, 3)
    if rates.get("ours_graphs") and rates.get("hf"):
        ratios["ours_over_hf_batch32"] = round(rates["ours_graphs"] / rates["hf"], 2)
    print("SUMMARY " + json.dumps({"requests_per_s": rates, **ratios}), flush=True)


def run_section(command: list[str], environment: dict, limit: float, log: Path) -> dict:
    """Run one section; its result, or why there is none, with the end of its log."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True
        )
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {"error": f"stopped after {limit:.0f} s", "log": log.read_text(errors="replace")[-1500:]}
    line = next((x for x in text.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        return {
            "error": f"ended with {process.returncode}",
            "log": (text[-1000:] + log.read_text(errors="replace"))[-3000:],
        }
    result = json.loads(line.removeprefix("RESULT "))
    if "error" in result:
        result["log"] = log.read_text(errors="replace")[-2000:]
    return result


if __name__ == "__main__":
    main()
