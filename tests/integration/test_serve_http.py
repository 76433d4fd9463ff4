"""Does ``mllm serve`` answer as `generate` does, and refuse what it must?"""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm.plugins import load_plugins
from mllm.processing.template import read_template
from mllm.serve.supervisor import ENDING, LEAVING
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import TINY_CLIP, TINY_LLM, TINY_TIMM, picture
from tests.hub_server import running_hub
from tests.integration.serving import OPERATOR, serving
from tests.integration.test_serve_vllm import write_checkpoint
from tests.test_readme import block

httpx = pytest.importorskip("httpx")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]

TOKENS = 8
TONE = (
    "{%- if tone is defined -%}{{- '<|im_start|>system\\n' + tone + '<|im_end|>\\n' -}}{%- endif -%}\n"  # own variable
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The README's encoder as a file, known to this process; the server's processes must be told of it."""
    path = tmp_path_factory.mktemp("plugin") / "my_encoder.py"
    path.write_text(block("plugin"))
    load_plugins([str(path)])
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, plugin):
    """An expert from a plug-in, and a template that ends turns by another token than EOS and has an option set."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("served")
    (folder / "tone.jinja").write_text(TONE + read_template("chatml"))
    return write_checkpoint(
        folder,
        seed=0,  # with it the four questions of the routing test take two routes
        chat_template=str(folder / "tone.jinja"),
        template_options={"tone": "Be brief."},
        language_model={
            "config": {**TINY_LLM, "max_position_embeddings": 2048},
            "tokenizer": str(folder / "tokenizer"),
        },
        encoders={"semantic": dict(TINY_CLIP), "spatial": dict(TINY_TIMM), "detail": {"type": "mean-colour"}},
        router={
            "type": "language_model",
            "experts": ["spatial", "detail"],
            "capabilities": {"spatial": "Finds things.", "detail": "Reads text."},
            "parser": "lenient",
        },
    )


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """A picture on disk and an HTTP server inside, neither of which may be read."""
    path = tmp_path_factory.mktemp("private") / "secret.png"
    picture(1).save(path)
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    inner = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=inner.serve_forever, daemon=True).start()
    yield path, f"http://127.0.0.1:{inner.server_port}/picture.png", seen
    inner.shutdown()


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    """PEFT adapters by name: of the language model, of it and an encoder ("tower"), and of it and the connector ("link")."""
    from peft import LoraConfig, get_peft_model

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    folders = {}
    where_of = {
        "tower": r".*(language_model|semantic)\..*q_proj",
        "link": r".*(language_model\..*q_proj|multi_modal_projector\..*(0|2))",
    }
    for number, name in enumerate(("one", "two", "later", "tower", "link")):
        where = where_of.get(name, r".*language_model\..*(v_proj|down_proj)")
        model = MllmForConditionalGeneration.from_pretrained(checkpoint)
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=where))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if ".lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        adapted.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def hub(checkpoint):
    """A hub that has the checkpoint as ``owner/tiny``."""
    with running_hub() as hub:
        files = {
            str(path.relative_to(checkpoint)): path.read_bytes()
            for path in Path(checkpoint).rglob("*")
            if path.is_file()
        }
        hub.add("owner/tiny", files)
        yield hub


@pytest.fixture(scope="module")
def server(hub, plugin, adapters, tmp_path_factory):
    """The checkpoint served by its name on a hub, fetched into an empty cache."""
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    options = [
        "--lora",
        f"one={adapters['one']}",
        "--lora",
        f"two={adapters['two']}",
        "--lora",
        f"tower={adapters['tower']}",
        "--plugin",
        str(plugin),
        "--max-model-len",
        "2048",
        "--max-images",
        "3",
        "--max-body-mb",
        "2",
        "--max-pixels",
        "1000000",
        "--shutdown-timeout",
        "5",
    ]
    with serving("owner/tiny", tmp_path_factory.mktemp("log") / "server.log", *options, **variables) as client:
        yield client


@pytest.fixture(scope="module")
def generate(checkpoint):
    """``generate(turns, images, experts)`` → text and routing of the same checkpoint in transformers."""
    from peft import PeftModel
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.serve import parity

    base = MllmForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    def answer(turns, images, experts=None, adapter=None):
        model = base
        if adapter is not None:
            fresh = MllmForConditionalGeneration.from_pretrained(checkpoint)
            model = PeftModel.from_pretrained(fresh, adapter).merge_and_unload().eval()
        case = parity.Case("served", turns, images, experts)
        _, inputs = parity.model_inputs(processor, case)
        width = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, tokenizer=processor.tokenizer
        )
        routing = model.last_routing
        ids = output[0, width:].tolist()
        return processor.tokenizer.decode(ids, skip_special_tokens=True), ids, routing

    return answer


def encode(image: Image.Image, form: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def with_text(url: str, *, after: bool) -> str:
    """A PNG with a text chunk that unpacks to 60 MB, before or after its pixels."""
    head, _, data = url.partition(",")
    content = base64.b64decode(data)
    packed = zlib.compress(bytes(60 * 2**20), 9)
    chunk = b"zTXt" + b"note\x00\x00" + packed
    made = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = content.rindex(b"IEND") - 4 if after else content.index(b"IDAT") - 4
    return f"{head},{base64.b64encode(content[:place] + made + content[place:]).decode()}"


def body(question: str, *urls: str, **extra) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }


def ask(server, *arguments, **extra):
    return server.post("/v1/chat/completions", json=body(*arguments, **extra))


def turn(question: str, count: int) -> list[Turn]:
    return [Turn("user", IMAGE_MARK * count + "\n" + question if count else question)]


def test_the_checkpoint_came_from_the_hub(server, hub):
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json", "my_encoder.py"} <= fetched


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_are_those_of_generate_with_greedy_decoding_as_the_default(server, generate, count):
    images = [picture(n, size=(40 + n, 33)) for n in range(count)]
    fixed = {"mm_processor_kwargs": {"experts": ["detail"]}} if count else {}
    response = ask(server, "what is it?", *(encode(image) for image in images), **fixed)
    assert response.status_code == 200, response.text
    _, ids, _ = generate(turn("what is it?", count), images, ["detail"] if count else None)
    assert response.json()["choices"][0]["token_ids"] == ids


def test_the_plugin_the_templates_options_and_the_stops_of_the_checkpoint_hold(server, checkpoint, generate):
    """The plug-in's picture reaches the answer, the option stands in the prompt unless the request sets it, and answers stop
    at every end in generation_config.json."""
    detail = {"mm_processor_kwargs": {"experts": ["detail"]}}
    answers = []
    for seed in (6, 7):
        response = ask(server, "what?", encode(picture(seed)), **detail)
        assert response.status_code == 200, response.text
        _, ids, _ = generate(turn("what?", 1), [picture(seed)], ["detail"])
        assert response.json()["choices"][0]["token_ids"] == ids
        answers.append(ids)
    assert answers[0] != answers[1]
    for given, tone in (({}, "Be brief."), ({"chat_template_kwargs": {"tone": "Go on."}}, "Go on.")):
        ids = ask(server, "what?", **given).json()["prompt_token_ids"]
        text = server.post("/detokenize", json={"model": "tiny", "tokens": ids}).json()["prompt"]
        assert text.startswith(f"<|im_start|>system\n{tone}<|im_end|>\n<|im_start|>user\nwhat?")
    stops = json.loads((Path(checkpoint) / "generation_config.json").read_text())["eos_token_id"]
    assert len(stops) == 2, "EOS and the end of the turn"
    for token in [*stops, 77]:
        choice = ask(server, "what?", logit_bias={str(token): 100}, ignore_eos=False).json()["choices"][0]
        told = (choice["finish_reason"], choice["token_ids"])
        assert told == (("stop", [token]) if token in stops else ("length", [token] * TOKENS))


def test_the_language_model_routes_behind_one_request(server, generate):
    routes = set()
    for number in range(4):
        image = picture(20 + number)
        question = f"question {number} about what?"
        response = ask(server, question, encode(image))
        assert response.status_code == 200, response.text
        _, ids, routing = generate(turn(question, 1), [image])
        names = [name for name, weight in zip(routing.experts, routing.weights[0].tolist()) if weight]
        assert response.headers["x-mllm-experts"] == (",".join(names) or "none")
        assert response.json()["choices"][0]["token_ids"] == ids
        routes.add(tuple(names))
    assert len(routes) > 1, "the questions should route differently"


def test_adapters_at_once_answer_each_as_its_own(server, generate, adapters):
    """Asked together about one picture, every name gives the tokens of `generate` with that adapter; all differ. One of them
    changes an encoder."""
    image, fixed = picture(31), {"experts": ["spatial"]}
    expected = {
        name: generate(turn("what?", 1), [image], ["spatial"], adapters.get(name))[1]
        for name in ("tiny", "one", "two", "tower")
    }
    assert len({tuple(ids) for ids in expected.values()}) == 4, "the adapters must matter"

    def tokens(name):
        response = ask(server, "what?", encode(image), model=name, mm_processor_kwargs=fixed)
        assert response.status_code == 200, response.text
        return name, response.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        for name, ids in pool.map(tokens, ["tower", "one", "tiny", "two"] * 4):
            assert ids == expected[name], f"{name} was answered by another adapter"
    number = 0  # routed by the language model, with the adapter on the encoder that it looks through
    _, ids, routing = generate(turn(f"question {number} about what?", 1), [image], adapter=adapters["tower"])
    response = ask(server, f"question {number} about what?", encode(image), model="tower")
    names = [name for name, weight in zip(routing.experts, routing.weights[0].tolist()) if weight]
    assert response.headers["x-mllm-experts"] == (",".join(names) or "none")
    assert response.json()["choices"][0]["token_ids"] == ids


def test_adapters_are_loaded_and_unloaded_by_the_operator(server, checkpoint, generate, adapters):
    """Under one name, one after the other: nothing of the first is left in any cache."""
    fixed = {"experts": ["spatial"]}
    operator = {"authorization": f"Bearer {OPERATOR}"}

    def change(what, **body):
        return server.post(f"/v1/{what}_lora_adapter", json=body, headers=operator)

    later = {"lora_name": "later", "lora_path": str(adapters["later"])}
    assert server.post("/v1/load_lora_adapter", json=later).status_code == 404, "a client's key must not do"
    assert ask(server, "what?", model="later").status_code == 404
    refused = change("load", lora_name="none", lora_path=checkpoint)
    assert refused.status_code == 400 and "no PEFT adapter" in refused.text
    answers = []
    for name in ("later", "link", "two"):
        loaded = change("load", **{**later, "lora_path": str(adapters[name])})
        assert loaded.status_code == 200, loaded.text
        for _ in range(2):
            response = ask(server, "what?", encode(picture(32)), model="later", mm_processor_kwargs=fixed)
            _, ids, _ = generate(turn("what?", 1), [picture(32)], ["spatial"], adapters[name])
            assert response.json()["choices"][0]["token_ids"] == ids, name
        answers.append(ids)
        assert change("unload", lora_name="later").status_code == 200
    assert answers[0] != answers[1] != answers[2]
    assert ask(server, "what?", model="later").status_code == 404


def test_streaming_gives_the_same_text_piece_by_piece(server):
    image = encode(picture(3))
    fixed = {"mm_processor_kwargs": {"experts": ["spatial"]}}
    whole = ask(server, "tell me", image, **fixed).json()["choices"][0]["message"]["content"]
    pieces = []
    with server.stream("POST", "/v1/chat/completions", json=body("tell me", image, stream=True, **fixed)) as response:
        assert response.headers["x-mllm-experts"] == "spatial"
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    assert len(pieces) > 2 and "".join(pieces) == whole


@pytest.mark.parametrize("kind", ["rgba", "palette", "grey16", "turned", "animated", "cmyk"])
def test_unusual_pictures_are_read_as_in_training(server, generate, kind):
    base = picture(9, size=(50, 34))
    options = {}
    if kind == "rgba":
        image = base.copy()
        image.putalpha(Image.linear_gradient("L").resize(base.size))
    elif kind == "palette":
        image = base.quantize(16)
        options = {"transparency": 3}
    elif kind == "grey16":
        image = Image.fromarray(__import__("numpy").arange(50 * 34, dtype="uint16").reshape(34, 50) * 38)
    elif kind == "turned":
        image = base
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    elif kind == "cmyk":
        image = base.convert("CMYK")
    else:
        image = base.quantize(16)
    url = (
        encode(image, "GIF", save_all=True, append_images=[picture(10, size=(50, 34)).quantize(16)])
        if kind == "animated"
        else encode(image, "JPEG" if kind == "cmyk" else "PNG", **options)
    )
    response = ask(server, "what?", url, mm_processor_kwargs={"experts": ["spatial"]})
    assert response.status_code == 200, response.text
    _, ids, _ = generate(turn("what?", 1), [base64.b64decode(url.partition(",")[2])], ["spatial"])
    assert response.json()["choices"][0]["token_ids"] == ids


def test_no_answer_holds_a_placeholder_whatever_the_client_asks_for(server, checkpoint):
    """Its log-probability stays the model's own: only the choice is bound."""
    place = json.loads((Path(checkpoint) / "config.json").read_text())["image_token_id"]

    def likeliest(choice):
        """Log-probability of the likeliest first token. (A taken one that is less likely stands in the place of the last.)"""
        return max(entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"])

    first = likeliest(ask(server, "what?", logprobs=True, top_logprobs=3).json()["choices"][0])
    for extra in ({}, {"temperature": 1.0, "n": 3}, {"allowed_token_ids": [place, place + 1]}, {"top_k": 1}):
        response = ask(server, "what?", logit_bias={str(place): 100}, logprobs=True, top_logprobs=3, **extra)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert len(choices) == extra.get("n", 1) and all(place not in choice["token_ids"] for choice in choices)
        assert [likeliest(choice) for choice in choices] == pytest.approx([first] * len(choices), abs=1e-4)


def test_a_typed_placeholder_takes_no_picture_slot(server, generate):
    image = picture(5)
    response = ask(server, "is <image> text?", encode(image), mm_processor_kwargs={"experts": "none"})
    _, ids, _ = generate(turn("is <image> text?", 1), [image], "none")
    assert response.status_code == 200 and response.json()["choices"][0]["token_ids"] == ids
    assert ask(server, "only <image><image> text").status_code == 200


def test_files_and_addresses_are_refused_and_never_read(server, secrets):
    path, address, seen = secrets
    for url in (f"file://{path}", address, address.replace("127.0.0.1", "localhost"), "ftp://127.0.0.1/x", str(path)):
        response = ask(server, "what?", url)
        assert 400 <= response.status_code < 500, (url, response.status_code, response.text)
    assert seen == []
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "text",
        "empty",
        "bad base64",
        "too many pixels",
        "too many pictures",
        "too large",
        "long text before",
        "long text after",
    ],
)
def test_bad_pictures_are_4xx(server, kind):
    good = encode(picture(4))
    urls = {
        "truncated": [good[: len(good) // 2 // 4 * 4]],
        "text": ["data:image/png;base64," + base64.b64encode(b"no picture").decode()],
        "empty": ["data:image/png;base64,"],
        "bad base64": ["data:image/png;base64,***"],
        "too many pixels": [encode(Image.new("RGB", (1001, 1000)))],
        "too many pictures": [good] * 4,
        "too large": ["data:image/png;base64," + "A" * 3_000_000],
        "long text before": [with_text(good, after=False)],
        "long text after": [with_text(good, after=True)],
    }[kind]
    response = ask(server, "what?", *urls, mm_processor_kwargs={"experts": "none"})
    if kind == "long text after":  # what stands after the pixels is never unpacked
        assert response.status_code == 200, response.text
        return
    assert 400 <= response.status_code < 500, response.text
    assert not any(len(word) > 80 for word in response.text.split())


def test_the_engines_own_refusals_echo_no_base64(server):
    for extra in (
        {"model": "A" * 5000},
        {"temperature": "A" * 5000},
        {"tools": ["A" * 5000]},
        {"stop": [["A" * 5000]]},
    ):
        response = ask(server, "what?", **extra)
        assert 400 <= response.status_code < 500 and "A" * 81 not in response.text, response.text[:300]


def test_the_document_has_our_fields_and_the_metrics_ours(server):
    document = server.get("/openapi.json").json()
    assert "/mllm/info" in document["paths"] and "/v1/chat/completions" in document["paths"]
    assert not [path for path in document["paths"] if "lora" in path or "sleep" in path or "collective" in path]
    assert server.get("/docs").text.count("static/swagger-ui") == 2
    assert ask(server, "what?", encode(picture(79)), mm_processor_kwargs={"experts": ["detail"]}).status_code == 200
    assert ask(server, "what?", uuid="x").status_code == 400
    metrics = server.get("/metrics").text
    for name in (
        'mllm_chosen_experts_total{expert="detail"}',
        'mllm_encoder_images_total{part="semantic",worker="0"}',
        'mllm_encoder_seconds_total{part="connector",worker="0"}',
        'mllm_refused_requests_total{reason="request",route="/v1/chat/completions"}',
        'mllm_pictures_total{route="/v1/chat/completions"}',
        "mllm_running_requests 0",
        "mllm_draining 0",
        "vllm:num_requests_waiting",
    ):
        assert name in metrics, name


def test_a_prompt_that_was_cut_through_its_pictures_is_4xx(server):
    response = ask(
        server, "what?", encode(picture(4)), mm_processor_kwargs={"experts": "none"}, truncate_prompt_tokens=3
    )
    assert 400 <= response.status_code < 500, response.text


def test_a_wrong_key_is_401_and_health_needs_none(server):
    with httpx.Client(base_url=server.base_url) as stranger:
        assert stranger.post("/v1/chat/completions", json=body("hello")).status_code == 401
        assert stranger.post("/tokenize", json={"model": "tiny", "prompt": "x"}).status_code == 401
        assert stranger.get("/mllm/stats").status_code == 401
        assert stranger.get("/health").status_code == 200


def test_a_client_that_leaves_in_mid_stream_leaves_a_working_server(server):
    with server.stream("POST", "/v1/chat/completions", json=body("go on", stream=True, max_tokens=1500)) as response:
        next(response.iter_lines())
    assert ask(server, "still there?").status_code == 200


def test_statistics_count_what_each_encoder_did(server):
    before = server.get("/mllm/stats").json()["workers"][0]
    assert ask(server, "what?", encode(picture(77)), mm_processor_kwargs={"experts": ["detail"]}).status_code == 200
    after = server.get("/mllm/stats").json()["workers"][0]
    grown = {name: after[name]["images"] - before[name]["images"] for name in after}
    assert grown == {"semantic": 1, "spatial": 0, "detail": 1, "connector": 1}


def test_the_two_passes_of_a_routing_run_the_first_encoder_once(server):
    before = server.get("/mllm/stats").json()["workers"][0]
    assert ask(server, "what is new?", encode(picture(78))).status_code == 200
    after = server.get("/mllm/stats").json()["workers"][0]
    assert after["semantic"]["images"] - before["semantic"]["images"] == 1
    assert after["connector"]["images"] - before["connector"]["images"] == 2


def test_a_json_schema_gives_json_without_white_space_to_the_end(server):
    """A random model would fill an object's gaps with white space to the end of its tokens."""
    colour = {"enum": ["red", "blue"]}
    schema = {"type": "object", "properties": {"colour": colour, "n": {"enum": [1, 2]}}, "required": ["colour", "n"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    for extra in ({}, {"temperature": 1.0, "seed": 5}):
        response = ask(server, "colour?", response_format=wanted, max_tokens=60, ignore_eos=False, **extra)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        answer = json.loads(choice["message"]["content"])
        assert answer["colour"] in ("red", "blue") and answer["n"] in (1, 2) and choice["finish_reason"] == "stop"


def test_several_answers_of_a_greedy_checkpoint_differ(server):
    response = ask(server, "go on", n=3)
    assert response.status_code == 200, response.text
    assert len({tuple(choice["token_ids"]) for choice in response.json()["choices"]}) > 1


def test_structured_output_passes_through(server):
    response = ask(server, "yes or no?", structured_outputs={"choice": ["yes", "no"]}, max_tokens=5, ignore_eos=False)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] in ("yes", "no")


def test_on_sigterm_running_answers_end_new_ones_are_refused_and_the_exit_is_clean(server):
    """The last test here: it ends the server."""
    begun, ends = threading.Barrier(4), []

    def stream():
        request = body("go on", stream=True, max_tokens=1900)
        with server.stream("POST", "/v1/chat/completions", json=request) as response:
            lines = response.iter_lines()
            next(lines)
            begun.wait(60)
            ends.append([line for line in lines if line][-2:])

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    server.server.terminate()
    while (health := server.get("/health")).status_code == 200:
        pass
    assert (health.status_code, "retry-after" in health.headers) == (503, True)
    refused = ask(server, "one more?")
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert server.server.wait(5 + ENDING + LEAVING + 20) == 0
    for thread in threads:
        thread.join(30)
    assert len(ends) == 3, "a stream hangs"
    for before, last in ends:
        assert last == "data: [DONE]"
        event = json.loads(before.removeprefix("data: "))
        assert event["error"]["code"] == 503 if "error" in event else event["choices"][0]["finish_reason"] == "length"
