"""How much memory is the cache given?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mllm.errors import ConfigError
from mllm.models import engine_memory as served_memory
from mllm.models.engine_memory import (
    Need,
    cpu_cache,
    engines_of,
    free_memory,
    gpu_share,
    memory_arguments,
    need_of,
    parse_memory,
    seats_of,
)

GIB = 2**30
SMALL = Need(weights=5 * 2**20, per_token=4096, length=2048, seats=128)
LARGE = Need(weights=14 * GIB, per_token=2**19, length=4096, seats=128)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("50%", 0.5), ("8GB", 8 * 10**9), ("8 gib", 8 * GIB), ("1", 1.0), ("1.5GiB", 3 * GIB // 2)],
)
def test_memory_is_a_share_or_a_size(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["", "8", "0", "-1GB", "150%", "8 apples", "GB", "nan"])
def test_other_texts_are_refused_with_what_was_expected(text):
    with pytest.raises(ConfigError, match="such as 8GB"):
        parse_memory(text)


def test_a_small_model_gets_a_cache_for_all_its_seats_and_no_more():
    assert cpu_cache(SMALL, None, free=16 * GIB, total=24 * GIB) == SMALL.all < 2 * GIB


def test_a_large_model_leaves_half_of_what_is_free_to_others():
    cache = cpu_cache(LARGE, None, free=64 * GIB, total=128 * GIB)
    assert LARGE.one <= cache <= 32 * GIB


def test_what_was_asked_for_bounds_weights_processes_and_cache_together():
    assert cpu_cache(LARGE, 24 * GIB, free=100 * GIB, total=128 * GIB) == 24 * GIB - 14 * GIB - 3 * GIB
    assert cpu_cache(LARGE, 0.5, free=100 * GIB, total=128 * GIB) == 64 * GIB - 17 * GIB
    with pytest.raises(ConfigError, match=r"asks for 64.0 GiB and 60.0 GiB of 128.0 GiB are free"):
        cpu_cache(LARGE, 0.5, free=60 * GIB, total=128 * GIB)
    with pytest.raises(ConfigError, match=r"0 MiB are asked for: give --memory [\d.]+GiB or more") as told:
        cpu_cache(SMALL, 1000, free=60 * GIB, total=128 * GIB)
    enough = parse_memory(str(told.value).split("--memory ")[1].split()[0])
    assert cpu_cache(SMALL, enough, free=60 * GIB, total=128 * GIB) >= SMALL.one


def test_a_length_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match="--max-model-len 1920 it would"):
        cpu_cache(LARGE, None, free=18 * GIB, total=24 * GIB)
    shorter = Need(LARGE.weights, LARGE.per_token, 1920, 128)
    assert cpu_cache(shorter, None, free=18 * GIB, total=24 * GIB) >= shorter.one
    with pytest.raises(ConfigError, match="free memory, or take a smaller model"):
        cpu_cache(LARGE, None, free=16 * GIB, total=24 * GIB)


def test_a_gpu_that_others_use_is_asked_for_what_is_free():
    assert gpu_share(None, free=79 * GIB, total=80 * GIB) == 0.92
    assert gpu_share(None, free=40 * GIB, total=80 * GIB) == 0.48
    assert gpu_share(20 * GIB, free=40 * GIB, total=80 * GIB) == 0.25
    with pytest.raises(ConfigError, match="are free"):
        gpu_share(0.9, free=40 * GIB, total=80 * GIB)


def test_a_models_need_is_read_from_its_config(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    text = SimpleNamespace(
        num_attention_heads=8, num_key_value_heads=2, hidden_size=64, num_hidden_layers=3, max_position_embeddings=512
    )
    config = SimpleNamespace(get_text_config=lambda: text, dtype="float32")
    assert need_of(str(tmp_path), config, dtype="auto", length=None, seats=4) == Need(1000, 2 * 3 * 2 * 8 * 4, 512, 4)
    assert need_of(str(tmp_path), config, dtype="bfloat16", length=99, seats=4) == Need(1000, 2 * 3 * 2 * 8 * 2, 99, 4)


def test_seats_are_read_among_vllms_own_options():
    assert [seats_of(x) for x in ([], ["--max-num-seqs", "3"], ["--max-num-seqs=5"])] == [128, 3, 5]
    for wrong in (["--max-num-seqs"], ["--max-num-seqs", "many"], ["--max-num-seqs=0"]):
        with pytest.raises(ConfigError, match=r"--max-num-seqs .*expected a whole number from 1 on"):
            seats_of(wrong)


def test_a_container_has_what_its_limit_leaves(tmp_path):
    machine = free_memory(tmp_path)
    assert 0 < machine[0] <= machine[1]
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 100\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == (400, 1000)
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(tmp_path)[1] == machine[1]


def test_engines_of_one_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(served_memory, "free_memory", lambda: (100 * GIB, 128 * GIB))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    two = ["--data-parallel-size", "2"]
    assert [engines_of(x) for x in ([], two, ["-dp=3"], [*two, "-dp", "4"])] == [1, 2, 3, 4]
    for memory, wanted in (("96GiB", 48 * GIB), ("0.5", 0.5), (None, None)):
        options, _ = memory_arguments(LARGE, memory, two)
        assert options == ["--kv-cache-memory-bytes", str(cpu_cache(LARGE, wanted, free=50 * GIB, total=64 * GIB))]
