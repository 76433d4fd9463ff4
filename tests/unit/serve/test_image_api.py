"""Are drawings refused that an engine can never hold?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mllm.errors import ConfigError
from mllm.serve.images.api import check_room


def engine(*, length=256, step=512, blocks=9, engines=1):
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=length),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=step),
        cache_config=SimpleNamespace(num_gpu_blocks=blocks, block_size=32),
        parallel_config=SimpleNamespace(data_parallel_size=engines),
    )


@pytest.mark.parametrize(
    ("requests", "settings"),
    [
        ([(128, 128)], {"blocks": 2}),  # vLLM itself checks that one request fits
        ([(64, 64)] * 2, {}),
        ([(64, 64)] * 2, {"blocks": 18, "engines": 2}),
        ([(64, 64)] * 2, {"step": 128}),
        ([(64, 64)] * 2, {"blocks": None}),
    ],
)
def test_what_fits_is_drawn(requests, settings):
    check_room(engine(**settings), requests)


@pytest.mark.parametrize(
    ("requests", "settings", "said"),
    [
        ([(129, 128)], {}, "257 tokens, above this server's limit of 256"),
        ([(65, 64)] * 2, {}, "fills 10 blocks of the KV cache, and this server has 8"),
        ([(64, 64)] * 2, {"blocks": 16, "engines": 2}, "fills 8 blocks of the KV cache, and this server has 7"),
        ([(64, 64)] * 2, {"step": 127}, "128 tokens, and this server reads 127 at once"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_cure(requests, settings, said):
    with pytest.raises(ConfigError, match=said):
        check_room(engine(**settings), requests)


def test_an_engine_of_unknown_size_is_asked():
    check_room(None, [(10**6, 10**6)] * 2)
