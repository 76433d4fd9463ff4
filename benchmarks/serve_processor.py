"""Does the installed vLLM hand our models the tokens and pixels that our own processor makes? Needs no engine, so also versions
without a CPU build can be asked.

    python benchmarks/serve_processor.py

Tiny checkpoints (two encoders on channels; three with a learned router), prompts of one to three pictures of odd sizes; prints a
line per checkpoint and ends with code 1 where an id, a pixel or a question that the router reads differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm.serve.vllm.plugin import register
from tests.helpers import TINY_CLIP, TINY_TIMM, picture, tiny_model

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "channels": {},
    "routed": {
        "encoders": {"semantic": dict(TINY_CLIP), "detail": dict(TINY_TIMM)},
        "router": {"type": "gate", "experts": ["detail"], "hidden": 16},
    },
}


def compare(folder: str) -> tuple[int, list[str]]:
    """How many fields were compared, and which differ."""
    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    ours = AutoProcessor.from_pretrained(folder)
    config = ModelConfig(folder, dtype="float32", max_model_len=512, enforce_eager=True)
    theirs = MULTIMODAL_REGISTRY.create_processor(config)
    compared, different = 0, []
    for number in (1, 2, 3):
        images = [picture(10 * number + k, size=(31 + 9 * k, 47 - 5 * k)) for k in range(number)]
        text = f"<|im_start|>user\n{'<image>' * number}\nquestion {number}?<|im_end|>\n<|im_start|>assistant\n"
        expected = ours(text=[text], images=[images], return_tensors="pt")
        ids = ours.tokenizer(text, add_special_tokens=False)["input_ids"]
        items = theirs.info.parse_mm_data({"image": images})
        made: Any = theirs.apply(ProcessorInputs(ids, items), TimingContext(enabled=False))
        found = {name: torch.stack(list(value)) for name, value in made["mm_kwargs"].get_data().items()}
        rows = {"input_ids": (torch.tensor(made["prompt_token_ids"]), expected["input_ids"][0])}
        for name, value in found.items():
            if name in expected:
                rows[name] = (value.reshape(-1), torch.as_tensor(expected[name]).reshape(-1))
        if len(rows) < 3:
            different.append(f"{number} pictures: vLLM has {sorted(found)}, the processor {sorted(expected)}")
        for name, (a, b) in rows.items():
            compared += 1
            if a.shape != b.shape or not torch.equal(a.nan_to_num(-7.0).double(), b.nan_to_num(-7.0).double()):
                different.append(f"{name} of {number} pictures")
    return compared, different


def main() -> None:
    import vllm

    register()
    failed = False
    for name, changes in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            model, processor = tiny_model(f"{folder}/tokenizer", **changes)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            compared, different = compare(folder)
        print(
            f"vLLM {vllm.__version__}  {name:10}  {compared} fields compared, {len(different)} differ {different or ''}"
        )
        failed |= bool(different)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
