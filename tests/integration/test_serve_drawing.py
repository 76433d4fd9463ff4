"""Does vLLM draw the codes of `generate_images`, guided or not, and does a pair that comes apart fail clearly?"""

from __future__ import annotations

import base64
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.processing.chat import render_prompt
from mllm.types import Turn
from tests.integration.engines import run
from tests.integration.serving import serving
from tests.unit.heads.drawing_models import drawing_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("drawer")
    model, processor = drawing_model(folder / "made", "vocabulary", "dualtoken")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def found_by(module, checkpoint, *more):
    done = run("-m", f"tests.integration.{module}", checkpoint, *more)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    assert line is not None, done.stderr[-4000:]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def drawn(checkpoint):
    return found_by("drawing_engine", checkpoint)


def test_guidance_and_prompts_move_the_codes(drawn):
    assert drawn["guidance_moves"] > 0
    assert drawn["prompts_differ"] > 1


@pytest.mark.parametrize("scale", ["1", "3"])
def test_greedy_codes_are_those_of_generate_images(drawn, scale):
    assert drawn[f"batch_{scale}"] is True
    assert drawn[f"single_{scale}"] == [True] * 4


def test_a_seed_draws_what_generate_images_draws_with_it_again_and_again(drawn):
    assert drawn["sampled_as_generate"] and drawn["sampled_again"]
    assert not drawn["sampled_other_seed"]


def test_half_a_pair_stops_with_a_clear_error_and_the_engine_goes_on(drawn):
    assert "did not stay together" in drawn["alone"]
    assert drawn["after_alone"]


@pytest.fixture(scope="module")
def crowded(checkpoint):
    loads = ["loads"] if os.environ.get("MLLM_NIGHTLY") else []  # what only the nightly tests ask for
    return found_by("drawing_engine_preemption", checkpoint, *loads)


@pytest.mark.parametrize("load", ["together", "backwards", "after_aborts"])
@pytest.mark.nightly
def test_where_memory_is_short_chats_are_preempted_guided_pairs_are_not_and_all_get_what_they_get_alone(crowded, load):
    assert sum(crowded["alone_preempted"].values()) == 0 and crowded["differ"] >= 8
    assert crowded[load] == [True] * 10
    preempted = crowded[f"{load}_preempted"]
    assert preempted["chat"] > 0 and preempted["one"] > 0 and preempted["pair"] == 0


def test_a_pair_that_is_preempted_is_drawn_to_its_end(crowded):
    assert crowded["emptied_preempted"]["pair"] >= 2
    assert crowded["emptied"] == [True] * 10


def test_a_chat_waits_for_the_drawings_before_it_and_no_others(crowded):
    assert crowded["ended_before_chat"] <= 5


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with serving(checkpoint, tmp_path_factory.mktemp("log") / "server.log", "--max-model-len", "256") as client:
        yield client


@pytest.fixture(scope="module")
def reference(checkpoint):
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    return MllmForConditionalGeneration.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)


def ask(server, prompt="Draw a seven, please", **settings):
    return server.post("/v1/images/generations", json={"prompt": prompt, **settings})


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))) for entry in answer.json()["data"]]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_server_draws_the_pictures_of_generate_images(server, reference, scale):
    model, processor = reference
    settings = {"cfg_scale": scale, "temperature": 0.8, "top_k": 20, "seed": 11}
    prompt = "Draw a seven, please"
    wanted = model.generate_images([prompt] * 3, processor=processor, **settings).pil()
    answer = ask(server, prompt, n=3, model="tiny", **settings)
    got = pictures(answer)
    assert [entry["seed"] for entry in answer.json()["data"]] == [11, 12, 13]
    for one, other in zip(got, wanted, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert len({picture.tobytes() for picture in got}) == 3
    assert answer.json()["size"] == f"{got[0].width}x{got[0].height}"
    assert answer.json()["usage"]["output_tokens"] > 0


def test_guided_drawings_and_chats_share_a_busy_server(server):
    """Ten guided drawings are twenty requests for eight seats, with chats in between; each is what it is alone."""
    alone = [pictures(ask(server, f"Draw {k}", cfg_scale=2.0, seed=k))[0].tobytes() for k in range(10)]

    def chat(number):
        body = {"model": "tiny", "max_tokens": 24, "messages": [{"role": "user", "content": f"Say {number}"}]}
        return server.post("/v1/chat/completions", json=body).status_code

    with ThreadPoolExecutor(20) as pool:
        chats = [pool.submit(chat, number) for number in range(10)]
        drawings = [pool.submit(ask, server, f"Draw {k}", cfg_scale=2.0, seed=k) for k in range(10)]
        assert [pictures(each.result())[0].tobytes() for each in drawings] == alone
        assert {each.result() for each in chats} == {200}


def test_a_chat_keeps_the_image_grammar_of_generate(server, reference):
    model, processor = reference
    moved = 0
    for question in ("Hello", "Say something of great length about the weather", "7"):
        ids = processor.tokenizer(render_prompt(processor, [Turn("user", question)]), add_special_tokens=False)[
            "input_ids"
        ]
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        body = {"model": "tiny", "max_tokens": 40, "temperature": 0, "return_token_ids": True}
        answer = server.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": question}]})
        got = answer.json()["choices"][0]["token_ids"]
        assert got == wanted[: len(got)] and len(got) > 1
        free = model.generate_text(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        moved += free != wanted
    assert moved, "without the rules these answers would be the same: the prompts show nothing"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"size": "1024x1024"}, 400, "this model draws"),
        ({"n": 5}, 400, "at most 4"),
        ({"n": 0}, 400, "n:"),
        ({"response_format": "url"}, 400, "response_format"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "seven " * 400}, 400, "limit of 256"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"cfg_scale": "much"}, 400, "cfg_scale"),
        ({"top_k": 2**70}, 400, "top_k"),
        ({"style": "vivid"}, 400, "style"),
        ({"model": "another"}, 404, "another"),
        ({"vllm_xargs": {"mllm_drawing": "x"}}, 400, "vllm_xargs"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(server, body, status, said):
    answer = ask(server, **body)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert server.get("/health").status_code == 200


def test_a_client_that_leaves_stops_its_drawing(server):
    """Before it is begun and while it goes on, however fast that is."""
    import httpx

    left = 0
    for patience in (0.001, 0.01, 0.03):
        try:
            timeout = httpx.Timeout(30, read=patience)
            server.post("/v1/images/generations", json={"prompt": "Draw", "n": 4, "cfg_scale": 2.0}, timeout=timeout)
        except httpx.ReadTimeout:
            left += 1
    assert left
    first = pictures(ask(server, "Draw", cfg_scale=2.0, seed=1))[0].tobytes()
    assert pictures(ask(server, "Draw", cfg_scale=2.0, seed=1))[0].tobytes() == first


def test_a_typed_image_mark_in_a_prompt_is_text(server):
    assert len(pictures(ask(server, "Draw <image> and <image_start>", cfg_scale=2.0, seed=3))) == 1
