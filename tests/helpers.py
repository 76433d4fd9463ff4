"""What small tokenizers, models and pictures do the tests share? Everything here is built offline and random."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

TINY_LLM: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
TINY_CLIP: dict[str, Any] = {
    "type": "hf",
    "architecture": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    },
    "layers": [-2],
}
TINY_TIMM: dict[str, Any] = {
    "type": "timm",
    "architecture": "vit_tiny_patch16_224",
    "options": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8},
    "image_size": 32,
    "layers": [-1],
}


@lru_cache(maxsize=1)
def _backend() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *alphabet])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def tiny_tokenizer(*, image_token: str | None = "<image>", template: str | None = "chatml") -> Any:
    """A byte-level tokenizer of 261 tokens, with a chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from mllm.processing.template import read_template

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *([image_token] if image_token else [])],
    )
    if template:
        tokenizer.chat_template = read_template(template)
    return tokenizer


def tiny_spec(tokenizer_path: str, **changes: Any) -> Any:
    """A model spec of two tiny encoders, channel concatenation and a two-layer Llama."""
    from mllm.recipe import ModelSpec

    data: dict[str, Any] = {
        "language_model": {"config": dict(TINY_LLM), "tokenizer": tokenizer_path},
        "encoders": {"semantic": dict(TINY_CLIP), "detail": dict(TINY_TIMM)},  # not in alphabetical order, on purpose
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
        "chat_template": "chatml",
    }
    data.update(changes)
    return ModelSpec.model_validate(data)


def tiny_model(folder: Any, *, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """Model and processor of `tiny_spec`, fp32, with features scaled so that every encoder moves the logits."""
    import torch

    from mllm.models.build import build_model

    tiny_tokenizer().save_pretrained(str(folder))
    torch.manual_seed(seed)
    model, processor = build_model(tiny_spec(str(folder), **changes))
    if model.model.multi_modal_projector is not None:
        with torch.no_grad():
            for parameter in model.model.multi_modal_projector.parameters():
                parameter.mul_(3.0)
    return model.eval(), processor


def picture(seed: int = 0, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A random RGB picture, width × height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


SIZES = [[(60, 30)], [], [(20, 50), (40, 40)], [(300, 3)]]
"""Of the pictures of `samples_of_unlike_sizes`, sample by sample."""


def samples_of_unlike_sizes() -> list[Any]:
    """Four samples with one, no, two and one picture, none of a size of another."""
    from mllm.types import IMAGE_MARK, Sample, Turn

    return [
        Sample(
            f"s{number}",
            [Turn("user", IMAGE_MARK * len(sizes) + " which " * (number + 1)), Turn("assistant", f"answer {number}")],
            [picture(10 * number + k, size=size) for k, size in enumerate(sizes)],
        )
        for number, sizes in enumerate(SIZES)
    ]


def free_port() -> int:
    """A port nobody listens on, below the range that outgoing connections draw from."""
    for port in range(20000 + os.getpid() % 10000, 32000, 7):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 20000 and 32000")


def torchrun(script: Path, *arguments: str, processes: int = 2, timeout: float = 300) -> None:
    """Run a Python file in several processes under torch's launcher; its last words when it fails."""
    # --standalone would look the machine's own name up, which a sandbox may not resolve.
    launcher = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(script), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as running:  # fmt: skip
        try:
            said = running.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            said = running.communicate()[0] + f"\n(killed after {timeout:.0f} s)"
    assert running.returncode == 0, said[-3000:]
