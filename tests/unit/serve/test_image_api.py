"""Are drawings refused that an engine can never hold, and those made beside it that it cannot make?"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

from mllm.errors import ConfigError
from mllm.serve.http.admission import ENVIRONMENT, Admission, AdmissionSettings
from mllm.serve.http.keys import Keys
from mllm.serve.images import beside
from mllm.serve.images.api import ImagesRequest, check_room


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


@pytest.mark.parametrize(
    ("head", "tokenizer"), [("separate", "vq"), ("depth", "dualtoken"), ("next_scale", "tokenflow")]
)
def test_a_head_that_vllm_cannot_run_draws_at_the_same_endpoint(tmp_path, head, tokenizer):
    """From ``mllm serve``'s own settings to the picture of `generate_images`, guided too."""
    from mllm.serve.server import ServeSettings, plan
    from tests.unit.heads.drawing_models import drawing_model

    model, processor = drawing_model(tmp_path / "made", head, tokenizer)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments, environment = plan(ServeSettings(checkpoint=str(tmp_path), name="m"))
    assert "--scheduler-cls" not in arguments
    settings = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    assert settings.draws_beside and settings.checkpoint == str(tmp_path)
    admission = Admission(None, settings, Keys([]))
    app = SimpleNamespace(state=SimpleNamespace(engine_client=object()))
    asked = {
        "prompt": "Draw a seven",
        "n": 2,
        "seed": 5,
        "cfg_scale": 2.0,
        "response_format": "b64_json",
        "style": "natural",
    }

    odd = [
        {"size": "1x1"},
        {"response_format": "url"},
        {"style": "vivid"},
        {"background": "transparent"},
        {"stream": True},
        {"prompt": "seven " * 600},
    ]

    async def go():
        async def with_app(scope, receive, send):
            await admission({**scope, "app": app}, receive, send)

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=with_app), base_url="http://localhost"
        ) as client:
            ordinary = {"stream": False, "moderation": "auto", "background": "opaque", "user": "somebody"}
            return [
                await client.post("/v1/images/generations", json={**asked, **changes}, timeout=60)
                for changes in (ordinary, *odd)
            ]

    answer, *refused = asyncio.run(go())
    assert answer.status_code == 200, answer.text
    expected = model.generate_images(
        [asked["prompt"]] * 2, processor=processor, seed=[5, 6], cfg_scale=2.0, batch_size=1
    )
    for drawn, wanted in zip(answer.json()["data"], expected.pil(), strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(drawn["b64_json"])))
        assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    assert answer.json()["usage"]["output_tokens"] == sum(codes.numel() for codes in expected.codes.codes.values())
    for changes, answer in zip(odd, refused, strict=True):
        assert answer.status_code == 400 and next(iter(changes)) in answer.json()["error"]["message"]


def test_drawings_that_wait_take_no_thread_of_others_and_leave_with_their_client(tmp_path, monkeypatch):
    from tests.unit.heads.drawing_models import drawing_model

    model, processor = drawing_model(tmp_path / "made", "separate", "vq")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    begun, go = [], threading.Event()
    monkeypatch.setattr(beside, "generate_images", lambda *_, **__: begun.append(go.wait()) or [].pop())
    generator = beside.ModelGenerator(str(tmp_path))

    async def crowd():
        request = ImagesRequest(prompt="Draw a seven")
        drawings = [asyncio.create_task(generator.draw(None, request)) for _ in range(64)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(int), 20) == 0
        for drawing in drawings:
            drawing.cancel()
        await asyncio.wait(drawings)
        go.set()

    asyncio.run(crowd())
    generator._one.shutdown()
    assert len(begun) <= 1, "drawings were made whose clients had left"
