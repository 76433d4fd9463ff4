"""Do masks and probabilities come with an answer over HTTP, as `segment` and `probability` give them in process?"""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mllm.processing.mask_files import decode_rle
from tests.helpers import picture
from tests.integration.serving import serving
from tests.unit.serve.test_served_heads import ANSWERS, MASKS, QUESTION, png, train_by_heart

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("vllm")]


def body(number: int, **more: Any) -> dict[str, Any]:
    """A chat about one of the learned pictures."""
    image = f"data:image/png;base64,{base64.b64encode(png(number)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": f"\n{QUESTION}"}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 48, **more}


def last_event(text: str) -> dict[str, Any]:
    """The chunk before a stream's end."""
    events = [event for event in text.split("\n\n") if event.strip()]
    assert events[-1] == "data: [DONE]"
    return json.loads(events[-2].removeprefix("data: "))


def test_masks_and_probabilities_come_with_answers_alone_together_and_in_streams(tmp_path) -> None:
    pytest.importorskip("vllm")
    model, processor, folder = train_by_heart(tmp_path / "model")
    model.save_pretrained(folder)
    wanted = [
        (
            model.segment(picture(k), questions=QUESTION, processor=processor, max_new_tokens=48),
            model.probability(picture(k), QUESTION, processor=processor, max_new_tokens=48),
        )
        for k in range(3)
    ]
    with serving(str(folder), tmp_path / "log") as client, ThreadPoolExecutor(6) as pool:
        ask = lambda number: client.post("/v1/chat/completions", json=body(number)).json()  # noqa: E731
        numbers = [0, 1, 2, 0, 2, 1]
        answers = [ask(0), *pool.map(ask, numbers)]
        for number, answer in zip([0, *numbers], answers):
            marked, sure = wanted[number]
            assert answer["choices"][0]["message"]["content"] == ANSWERS[number], answer
            assert len(answer["mllm_masks"]) == len(MASKS[number])
            for given, mask in zip(answer["mllm_masks"], marked.masks.numpy()):
                assert (decode_rle(given["rle"]) != mask).mean() < 0.01 and mask.any()
            assert answer["mllm_probability"] == pytest.approx(sure.probabilities, abs=1e-4)
        stream = client.post("/v1/chat/completions", json=body(1, stream=True)).text
        assert last_event(stream)["mllm_masks"] == answers[2]["mllm_masks"]
        assert client.post("/v1/chat/completions", json=body(1, n=2)).status_code == 400
        assert client.get("/mllm/info").json()["masks"] is True
