"""Does a model that no process has room for start under ZeRO-3, with the values of one that is built in one piece?"""

from __future__ import annotations

import ctypes
import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mllm.recipe import Recipe
from mllm.train.engine.shares import whole
from mllm.train.launch import launch
from mllm.train.start import start_model
from tests.helpers import tiny_tokenizer
from tests.integration.train_helpers import LLM, make_recipe

MIXTURE = {**LLM, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LARGE = {**LLM, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 6}
"""43 MB in fp32, of which the embedding, which stays whole, is 0.2."""
_M_MMAP_THRESHOLD = -3
ROOM = 0.8
"""Share of the model that a process has room for: its half, and the weights that are whole at the same time."""


def _recipe(folder: Path, config: dict[str, Any] | None, source: Path | None = None, dtype: str = "float32") -> Recipe:
    recipe = make_recipe(folder, stages=[{"name": "sft", "steps": 1, "engine": "zero3", "dtype": dtype}])
    language = recipe.model.text_model.model_dump() | {"config": config, "source": source and str(source)}
    plain = recipe.model_dump()
    return Recipe.model_validate({**plain, "model": {**plain["model"], "language_model": language}})


def _publish(folder: Path, config: dict[str, Any]) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(folder, max_shard_size=f"{model.num_parameters() * 4 // 5 // 1000}KB")
    tiny_tokenizer().save_pretrained(str(folder))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def _start(recipe: Recipe, previous: Path | None, *, in_shares: bool) -> Any:
    return start_model(recipe, recipe.stages[0], previous, device=torch.device("cpu"), in_shares=in_shares)[0]


def _compare(recipes: dict[str, str]) -> None:
    """The body of every process: each recipe (name → JSON), ordinarily and in shares, and both again from what it saves."""
    for name, text in recipes.items():
        recipe, previous = Recipe.model_validate_json(text), None
        for _ in range(2):
            wanted = _start(recipe, previous, in_shares=False)
            after = torch.rand(())
            found = _start(recipe, previous, in_shares=True)
            assert previous is not None or torch.equal(torch.rand(()), after), f"{name}: other numbers were drawn"
            parameters = dict(found.named_parameters())
            cut = [n for n, p in parameters.items() if hasattr(p, "ds_id")]
            layers = [n for n in parameters if ".layers." in n and "language_model" in n]
            assert layers and set(layers) <= set(cut) and not any("embed_tokens" in n for n in cut)
            assert sum(parameters[n].numel() for n in cut) == 0
            assert list(parameters) == [n for n, _ in wanted.named_parameters()]  # tied alike
            for key, value in wanted.named_parameters():
                with whole([parameters[key]]):
                    assert torch.equal(parameters[key], value) and parameters[key].dtype == value.dtype, (name, key)
            buffers = dict(found.named_buffers())
            assert all(torch.equal(buffers[key], value) for key, value in wanted.named_buffers())
            previous = Path(recipe.output) / name
            if torch.distributed.get_rank() == 0:
                wanted.save_pretrained(previous)
                start_model(recipe, recipe.stages[0], None)[1].save_pretrained(previous)
            torch.distributed.barrier()


def test_values_are_those_of_a_model_in_one_piece(tmp_path):
    """From scratch (a mixture of experts, tied) and published (several files, untied), with two encoders and a connector; each also from
    an earlier stage."""
    source = _publish(tmp_path / "lm", {**LLM, "tie_word_embeddings": False})
    recipes = {
        "experts": _recipe(tmp_path, MIXTURE),
        "published": _recipe(tmp_path, None, source, "bfloat16"),
    }
    launch(_compare, 2, {name: r.model_dump_json() for name, r in recipes.items()}, needs_group=True)


def _own_bytes() -> int:
    """What this process holds and no file does."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the system does not say")


@contextmanager
def _peak(found: list[int]) -> Iterator[None]:
    before, over = _own_bytes(), threading.Event()
    found.append(0)

    def watch() -> None:
        while not over.wait(0.005):
            found[-1] = max(found[-1], _own_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _start_within(small: str, published: str, made: str, size: int, output: str) -> None:
    ctypes.CDLL(None).mallopt(
        _M_MMAP_THRESHOLD, 1 << 16
    )  # else what is let go stays in glibc's heap, between what is kept
    _start(Recipe.model_validate_json(small), None, in_shares=True)  # imports and pools are no part of the model
    peaks: list[int] = []
    for text in (published, made):
        with _peak(peaks):
            if text is made:
                status = Path("/proc/self/status").read_text().splitlines()
                now = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
                resource.setrlimit(resource.RLIMIT_DATA, (now + int(ROOM * size), resource.RLIM_INFINITY))
            model = _start(Recipe.model_validate_json(text), None, in_shares=True)
    held = sum(p.ds_tensor.numel() if hasattr(p, "ds_id") else p.numel() for p in model.parameters()) * 4
    Path(output, f"{torch.distributed.get_rank()}.json").write_text(json.dumps({"peaks": peaks, "held": held}))


def test_a_model_larger_than_a_processs_room_starts(tmp_path):
    """Read from files, what is no file's is measured; made on the spot, the system itself grants no more (`RLIMIT_DATA`, which would
    count mapped files too)."""
    size = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.for_model(**LARGE)).parameters())
    recipes = [
        _recipe(tmp_path, LLM),
        _recipe(tmp_path, None, _publish(tmp_path / "lm", LARGE)),
        _recipe(tmp_path, LARGE),
    ]
    launch(_start_within, 2, *[r.model_dump_json() for r in recipes], size, str(tmp_path), needs_group=True)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0.45 * size < found["held"] < 0.6 * size
        assert max(found["peaks"]) < ROOM * size, [peak / size for peak in found["peaks"]]
