"""Does a request reach the adapter that it names, also when adapters come and go under the same name?"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from safetensors.torch import save_file

from mllm.serve.adapters import ADAPTER
from mllm.serve.http.adapters import ServedAdapters
from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.errors import Refused
from mllm.serve.http.keys import Keys
from tests.unit.serve.test_admission import LETTERS, Echo, ask, chat, picture

STATIC = {"adapters": ["words", "eyes"], "visual_adapters": {"eyes": 2}}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def named(model, *parts, **extra):
    return chat(*parts, model=model, **extra)


def test_a_picture_is_told_the_visual_adapter_of_its_model_and_no_client_can_say_another():
    app = Echo()
    for model in ("eyes", "words", "base", "eyes"):
        assert ask(app, named(model, picture()), **STATIC).status_code == 200
    settings = [body.get("mm_processor_kwargs") for body in app.bodies]
    assert settings == [{ADAPTER: 2}, None, None, {ADAPTER: 2}]
    salts = [body["cache_salt"] for body in app.raw]
    assert ask(app, named("eyes", "no picture"), **STATIC).status_code == 200
    assert "mm_processor_kwargs" not in app.bodies[-1]
    assert len(salts) == 4
    refused = ask(app, named("base", picture(), mm_processor_kwargs={ADAPTER: 2}), **STATIC)
    assert refused.status_code == 400


def test_routing_and_adapter_stand_side_by_side_in_both_passes():
    app = Echo("charts")
    assert ask(app, named("eyes", picture()), router=LETTERS, **STATIC).status_code == 200
    first, second = (body["mm_processor_kwargs"] for body in app.bodies)
    assert first == {ADAPTER: 2, "routing_pass": True}
    assert second[ADAPTER] == 2 and second["experts"]


def test_where_the_engine_cannot_be_told_pictures_are_refused():
    source = {"type": "base64", "media_type": "image/png", "data": picture()["image_url"]["url"].partition(",")[2]}
    content = [{"type": "image", "source": source}]
    body = {"model": "eyes", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    answer = ask(Echo(), body, path="/v1/messages", **STATIC)
    assert answer.status_code == 400 and "/v1/chat/completions" in answer.json()["error"]["message"]
    assert ask(Echo(), {**body, "model": "words"}, path="/v1/messages", **STATIC).status_code == 200


class Engine:
    """vLLM's client and app: keeps what workers are told, and refuses what it is told to refuse."""

    def __init__(self):
        self.told, self.status, self.asked = [], 200, []
        self.wait = asyncio.Event()

    async def collective_rpc(self, method, timeout=None, args=()):
        if args[-1] == "broken":
            raise RuntimeError("no such layer")
        self.told.append((method, *args))
        return [None]

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        if "messages" in body:
            self.asked.append(body)
            if body.get("max_tokens") == 1:
                await self.wait.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def write_adapter(folder, part):
    import torch
    from peft import LoraConfig

    folder.mkdir()
    parts = {part, "language_model.layers.0"}
    tensors = {
        f"base_model.model.model.{one}.q_proj.lora_{side}.weight": torch.zeros(1, 1) for side in "AB" for one in parts
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=1, target_modules=["q_proj"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return {
        "words": write_adapter(tmp_path / "words", "language_model.layers.0"),
        "eyes": write_adapter(tmp_path / "eyes", "vision_tower.encoders.semantic"),
        "head": write_adapter(tmp_path / "head", "heads.draw"),
    }


def test_an_adapter_that_a_models_heads_would_not_see_is_refused(folders):
    async def never():
        raise AssertionError("it was handed on")

    adapters = ServedAdapters([], {}, heads=True)
    with pytest.raises(Refused, match="heads look through them without"):
        asyncio.run(adapters.load({"lora_name": "x", "lora_path": folders["eyes"]}, None, never))


def test_adapters_come_and_go_whole_and_a_name_never_finds_what_another_left(folders):
    engine = Engine()
    admission = Admission(engine, AdmissionSettings(), Keys(["client"], "root"))
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))

    async def inner(scope, receive, send):
        await admission({**scope, "app": app}, receive, send)

    async def go():
        transport = httpx.ASGITransport(app=inner)
        operator, client = {"authorization": "Bearer root"}, {"authorization": "Bearer client"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:

            async def change(path, name, folder=None):
                body = {"lora_name": name, **({"lora_path": folder} if folder else {})}
                return (await http.post(path, json=body, headers=operator)).status_code

            async def question(**extra):
                return await http.post("/v1/chat/completions", json=named("x", picture(), **extra), headers=client)

            async def message():
                words = {"model": "x", "max_tokens": 2, "messages": [{"role": "user", "content": "what?"}]}
                return (await http.post("/v1/messages", json=words, headers=client)).status_code

            await question()
            assert await change(LOAD, "x", folders["words"]) == 200 and engine.told == []
            await question()
            assert await message() == 200
            engine.asked.pop()
            assert await change(UNLOAD, "x") == 200
            assert await change(LOAD, "x", folders["eyes"]) == 200
            assert await message() == 400, "it has no salt: it would read what the first left"
            assert engine.told == [("add_visual_adapter", 2, folders["eyes"])]
            running = asyncio.create_task(question(max_tokens=1))
            while len(engine.asked) < 3:
                await asyncio.sleep(0)
            leaving = asyncio.create_task(change(UNLOAD, "x"))
            await asyncio.sleep(0.2)
            assert len(engine.told) == 1, "a request that runs keeps its adapter"
            engine.wait.set()
            assert (await running).status_code == 200 and await leaving == 200
            assert engine.told[1:] == [("remove_visual_adapter", 2)]
            await question()

            assert await change(LOAD, "y", folders["head"]) == 400  # would be applied in part
            engine.told.clear()
            engine.status = 400  # vLLM refuses: what was read is forgotten
            assert await change(LOAD, "y", folders["eyes"]) == 400
            assert [told[0] for told in engine.told] == ["add_visual_adapter", "remove_visual_adapter"]

    asyncio.run(go())
    told = [body.get("mm_processor_kwargs") for body in engine.asked]
    assert told == [None, None, {ADAPTER: 2}, None]
    salts = [body["cache_salt"] for body in engine.asked]
    assert salts[0] == salts[3] and len(set(salts)) == 3, "the beginnings of prompts were shared between adapters"
