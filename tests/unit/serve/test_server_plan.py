"""With which arguments and environment is a checkpoint served?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from mllm.errors import ConfigError
from mllm.heads.codes.settings import VLLM_PLACEHOLDER
from mllm.serve.http.admission import ENVIRONMENT, AdmissionSettings
from mllm.serve.options import check_port, check_values, written_out
from mllm.serve.server import NO_DOMAIN, ServeSettings, _what_is_on, http_processes, plan, serve
from tests.helpers import ROOT, TINY_CLIP, TINY_LLM, TINY_TIMM, tiny_model

ROUTED = {
    "encoders": {"semantic": dict(TINY_CLIP), "spatial": dict(TINY_TIMM)},
    "router": {"type": "gate", "experts": ["spatial"], "hidden": 8},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {}
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "routed": ROUTED, "film": {"video": {"fps": 1, "max_frames": 12}}}
    for name, changes in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        model, processor = tiny_model(folder / "tokenizer", **changes)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def value_of(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_the_defaults_are_safe(checkpoints):
    arguments, environment = plan(ServeSettings(checkpoint=checkpoints["plain"]))
    assert value_of(arguments, "--host") == "127.0.0.1"
    assert value_of(arguments, "--allowed-media-domains") == NO_DOMAIN
    assert json.loads(value_of(arguments, "--limit-mm-per-prompt")) == {"image": 8}
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "75", "a proxy keeps a connection for 60 s"
    assert environment["VLLM_MAX_IMAGE_PIXELS"] == "16000000"
    assert "VLLM_API_KEY" not in environment
    for option in (
        "--trust-remote-code",
        "--trust-request-mm-kwargs",
        "--allowed-local-media-path",
        "--enable-mm-embeds",
    ):
        assert option not in arguments
    admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    assert (admission.max_body_bytes, admission.max_pixels, admission.media_domains) == (32 * 2**20, 16_000_000, [])
    assert admission.router is None


def test_greedy_checkpoints_are_served_greedily(checkpoints):
    arguments, _ = plan(ServeSettings(checkpoint=checkpoints["plain"]))
    assert json.loads(value_of(arguments, "--override-generation-config")) == {"temperature": 0.0}


def test_the_admission_knows_what_a_model_takes_of_a_video(checkpoints):
    found = {}
    for name in ("plain", "film"):
        arguments, environment = plan(ServeSettings(checkpoint=checkpoints[name], max_videos=3))
        admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
        limit = json.loads(value_of(arguments, "--limit-mm-per-prompt")).get("video", 0)
        found[name] = (limit, admission.max_videos, admission.max_frames, admission.max_seconds)
    assert found == {"plain": (0, 0, 0, 0.0), "film": (3, 3, 12, 4 * 3600.0)}


def test_a_routed_checkpoint_tells_the_admission_its_experts(checkpoints):
    arguments, environment = plan(ServeSettings(checkpoint=checkpoints["routed"]), "secret")
    admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    assert admission.router is not None and admission.router["experts"] == ["spatial"]
    assert environment["MLLM_API_KEY"] == "secret" and "secret" not in arguments


def test_the_transformers_backend_is_refused_where_it_would_answer_differently(checkpoints):
    with pytest.raises(ConfigError, match="--backend native"):
        plan(ServeSettings(checkpoint=checkpoints["routed"], backend="transformers"))
    arguments, _ = plan(ServeSettings(checkpoint=checkpoints["plain"], backend="transformers"))
    assert value_of(arguments, "--model-impl") == "transformers"


def test_options_and_extra_arguments_are_passed_on(checkpoints, tmp_path):
    served = f"x={adapter(tmp_path)}"
    settings = ServeSettings(
        checkpoint=checkpoints["plain"],
        media_domains=["a.org", "b.org"],
        tensor_parallel=2,
        eager=True,
        name="mine",
        max_model_len=99,
        lora=[served],
        extra=["--max-num-seqs", "3"],
    )
    arguments, environment = plan(settings)
    # Pictures are fetched before the engine, which never does it.
    assert value_of(arguments, "--allowed-media-domains") == NO_DOMAIN
    admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    assert admission.media_domains == ["a.org", "b.org"]
    assert value_of(arguments, "--served-model-name") == "mine"
    assert value_of(arguments, "--tensor-parallel-size") == "2"
    assert value_of(arguments, "--mm-encoder-tp-mode") == "data"
    assert value_of(arguments, "--max-model-len") == "99"
    assert "--enforce-eager" in arguments and value_of(arguments, "--lora-modules") == served
    assert arguments[-2:] == ["--max-num-seqs", "3"]


@pytest.mark.parametrize(
    ("cores", "gpus", "pixels", "count"),
    [
        (2, 1, 16e6, 1),
        (4, 1, 16e6, 1),
        (8, 1, 16e6, 3),
        (16, 1, 16e6, 4),
        (64, 8, 16e6, 4),
        (16, 1, 500_000, 2),
        (8, 8, 16e6, 1),
    ],
)
def test_requests_are_taken_by_as_many_processes_as_cores_are_left(cores, gpus, pixels, count):
    assert http_processes(cores, gpus, int(pixels)) == count


def test_processes_for_http_are_chosen_on_a_gpu_unless_something_needs_one(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setattr("mllm.serve.server.os.sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (100 * 2**30, 140 * 2**30))
    monkeypatch.delenv("MLLM_ADMIN_KEY", raising=False)
    served = {"checkpoint": checkpoints["plain"]}
    assert value_of(plan(ServeSettings(**served))[0], "--api-server-count") == "4"
    for extra in (["--api-server-count", "2"], ["--data-parallel-size=2", "--data-parallel-rank", "0"], ["--headless"]):
        arguments = plan(ServeSettings(**served, extra=extra))[0]
        assert arguments.count("--api-server-count") == extra.count("--api-server-count"), extra
    monkeypatch.setattr("mllm.serve.server.os.sched_getaffinity", lambda _: range(32))
    for extra in (["--data-parallel-size=2"], ["-dp", "2"]):
        assert value_of(plan(ServeSettings(**served, extra=extra))[0], "--api-server-count") == "8", extra
    monkeypatch.setenv("MLLM_ADMIN_KEY", "of-the-operator")  # an adapter is loaded into the process that is asked
    adapted = ServeSettings(**served, lora=[f"x={adapter(tmp_path)}"])
    assert "--api-server-count" not in plan(adapted)[0]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--api-server-count" not in plan(ServeSettings(**served))[0], "on a CPU the cores are the engine's"


def test_no_answer_holds_a_placeholder(checkpoints):
    """A processor of ours stands in every server; beside speculative decoding the model does its work."""
    for name in ("plain", "routed"):
        arguments, environment = plan(ServeSettings(checkpoint=checkpoints[name]))
        assert value_of(arguments, "--logits-processors") == VLLM_PLACEHOLDER
        assert "VLLM_USE_V2_MODEL_RUNNER" not in environment
    extra = ["--speculative-config", "{}"]
    assert "--logits-processors" not in plan(ServeSettings(checkpoint=checkpoints["plain"], extra=extra))[0]


def adapter(folder, *, part="language_model", beside=None, r=4, **changes):
    """A PEFT adapter's folder, as far as its names and config go."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    parts = [part] if beside is None else [part, beside]
    names = [f"base_model.model.model.{one}.q_proj.lora_A.weight" for one in parts]
    save_file({name: torch.zeros(1) for name in names}, folder / "adapter_model.safetensors")
    LoraConfig(r=r, target_modules=["q_proj"], **changes).save_pretrained(folder)
    return folder


def test_adapters_are_read_before_the_start(checkpoints, tmp_path):
    plain = checkpoints["plain"]
    good, large = adapter(tmp_path / "good"), adapter(tmp_path / "large", rank_pattern={"layers.0": 40})
    arguments, _ = plan(ServeSettings(checkpoint=plain, lora=[f"a={good}", f"b={large}"]))
    assert (value_of(arguments, "--max-lora-rank"), value_of(arguments, "--max-loras")) == ("64", "2")
    at = arguments.index("--lora-modules")
    assert arguments[at + 1 : at + 3] == [f"a={good}", f"b={large}"]
    for wrong, says in (
        (adapter(tmp_path / "head", part="heads.draw"), "also changes .*heads.draw.*mllm export"),
        (adapter(tmp_path / "dora", use_dora=True), "DoRA"),
        (adapter(tmp_path / "huge", r=1000), "rank 1000"),
        (tmp_path / "none", "no PEFT adapter"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan(ServeSettings(checkpoint=plain, lora=[f"a={good}", f"b={wrong}"]))
    with pytest.raises(ConfigError, match="one name"):
        plan(ServeSettings(checkpoint=plain, lora=[f"a={good}", f"a={large}"]))


def test_adapters_of_encoders_are_told_the_engine_and_the_admission_by_number(checkpoints, tmp_path):
    plain = checkpoints["plain"]
    words = adapter(tmp_path / "words")
    tower = adapter(tmp_path / "tower", part="vision_tower.encoders.semantic", beside="language_model")
    arguments, environment = plan(ServeSettings(checkpoint=plain, lora=[f"words={words}", f"tower={tower}"]))
    assert json.loads(value_of(arguments, "--additional-config")) == {"mllm_adapters": {"2": str(tower)}}
    assert "--trust-request-mm-kwargs" in arguments
    admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    assert (admission.adapters, admission.visual_adapters) == (["words", "tower"], {"tower": 2})
    later, _ = plan(ServeSettings(checkpoint=plain, extra=["--enable-lora"]))
    assert json.loads(value_of(later, "--additional-config")) == {"mllm_adapters": {}}
    assert "--additional-config" not in plan(ServeSettings(checkpoint=plain))[0]
    with pytest.raises(ConfigError, match="--backend native"):
        plan(ServeSettings(checkpoint=plain, lora=[f"tower={tower}"], backend="transformers"))
    for option in ("--lora-modules", "--additional-config"):
        with pytest.raises(ConfigError, match="--lora name=folder"):
            plan(ServeSettings(checkpoint=plain, extra=["--enable-lora", option, "x"]))


def test_adapters_come_and_go_by_the_operators_key_only(checkpoints, monkeypatch, tmp_path):
    monkeypatch.delenv("MLLM_ADMIN_KEY", raising=False)
    settings = ServeSettings(checkpoint=checkpoints["plain"], lora=[f"x={adapter(tmp_path)}"])
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plan(settings)[1]
    monkeypatch.setenv("MLLM_ADMIN_KEY", "of-the-operator")
    assert plan(settings)[1]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plan(ServeSettings(checkpoint=checkpoints["plain"]))[1]
    # vLLM takes a process for requests for each data-parallel engine; an adapter is loaded into one, and the other knows of none.
    two = ["--data-parallel-size", "2"]
    assert value_of(plan(settings.model_copy(update={"extra": two}))[0], "--api-server-count") == "1"
    plan(settings.model_copy(update={"extra": [*two, "--api-server-count", "1"]}))
    for several in (["--api-server-count", "2"], ["--api-server-count=2"], ["-asc", "2"]):
        with pytest.raises(ConfigError, match="leave out"):
            plan(settings.model_copy(update={"extra": several}))
    monkeypatch.delenv("MLLM_ADMIN_KEY")
    assert "--api-server-count" not in plan(settings.model_copy(update={"extra": two}))[0]


def test_a_file_of_keys_is_read_before_the_start_and_named_to_the_server(checkpoints, tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("team-a: {key: a-long-key, requests: 60}")
    _, environment = plan(ServeSettings(checkpoint=checkpoints["plain"], keys=str(file)))
    assert environment["MLLM_KEYS_FILE"] == str(file) and "a-long-key" not in str(environment)
    assert not AdmissionSettings.model_validate_json(environment[ENVIRONMENT]).loopback
    file.write_text("team-a: {key: a-long-key, request: 60}")
    with pytest.raises(ConfigError, match="requests"):
        plan(ServeSettings(checkpoint=checkpoints["plain"], keys=str(file)))


def test_an_open_port_needs_a_key(checkpoints, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.delenv("MLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="MLLM_API_KEY"):
        serve(ServeSettings(checkpoint=checkpoints["plain"], host="0.0.0.0"))


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint"):
        plan(ServeSettings(checkpoint=str(tmp_path)))
    for missing in (str(tmp_path / "none"), "./none", "none", "runs/demo/none"):
        with pytest.raises(ConfigError, match="no such folder"):
            plan(ServeSettings(checkpoint=missing))


def test_a_misspelt_option_of_vllms_is_refused_before_vllm_is_imported(checkpoints):
    pytest.importorskip("vllm")
    for extra in (
        ["--max-num-seq-s", "3"],
        ["--enable-prefx-caching"],
        ["--api-key", "x"],
        ["--data-parallel-size", "two"],
    ):
        with pytest.raises(ConfigError, match=extra[0]):
            plan(ServeSettings(checkpoint=checkpoints["plain"], extra=extra))
    known = [
        "--max_num_seqs=3",
        "--no-enable-prefix-caching",
        "--compilation-config.mode",
        "0",
        "--uvicorn-log-level",
        "x",
    ]
    plan(ServeSettings(checkpoint=checkpoints["plain"], extra=known))


def test_vllms_options_are_understood_by_whatever_name_vllm_takes(checkpoints):
    """It takes underscores and the beginning of a name; a check that looks for the whole name alone would be passed by."""
    pytest.importorskip("vllm")
    assert written_out(["--max_num_seqs=3", "--gpu-memory-util", "0_5", "-O3"]) == [
        "--max-num-seqs=3", "--gpu-memory-utilization", "0_5", "-O3",
    ]  # fmt: skip
    for given, words in (
        ("--api-ke=x", "readable in the list of processes"),
        ("--api_key=x", "readable in the list of processes"),
        ("--data-par", "write the option out; it may be --data-parallel-"),
        ("--lora_modul=x", "--lora-modules: adapters are given by --lora"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(ServeSettings(checkpoint=checkpoints["plain"], lora=["a=b"], extra=[given]))
    arguments, _ = plan(ServeSettings(checkpoint=checkpoints["plain"], extra=["--allowed_origins", '["x"]']))
    assert arguments.count("--allowed-origins") == 1


def test_the_admission_is_told_what_a_models_videos_need(checkpoints, tmp_path):
    found = []
    for video in ({}, {"which": "space_aware", "frames": 4, "fps": None, "stamp": "{seconds:.1f}s: "}):
        folder = shutil.copytree(checkpoints["film"], tmp_path / str(len(found)))
        config = json.loads((folder / "config.json").read_text())
        config["video"] |= video
        (folder / "config.json").write_text(json.dumps(config))
        told = AdmissionSettings.model_validate_json(plan(ServeSettings(checkpoint=str(folder)))[1][ENVIRONMENT])
        found.append((told.max_frames, told.timed, told.whole))
    assert found == [(12, False, False), (4, True, True)]


def test_a_container_that_is_stopped_while_its_server_is_read_ends_at_once():
    """It was killed after the whole grace period: the first process of a container hears no signal that it has no handler for."""
    code = (
        "import os, sys, time\nfrom mllm.cli import arguments\nfrom mllm.cli.main import main\nos.getpid = lambda: 1\n"
        "arguments.checkpoint = lambda name, **_: (print('reading', flush=True), time.sleep(60))\nsys.argv = ['mllm', 'serve', 'x']\nmain()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        process.terminate()
        assert process.wait(20) == 0


def test_an_address_is_no_name_of_a_host():
    check_values(None, None, ["images.example.org", "127.0.0.1", "localhost", "::1"])
    for wrong in ("http://x/y", "x:80", "x/y", "", "a b"):
        with pytest.raises(ConfigError, match="expected the name of a host alone"):
            check_values(None, None, [wrong])


def test_a_port_that_is_none_is_named():
    with pytest.raises(ConfigError, match="--port 99999: expected 1 to 65535"):
        check_port("127.0.0.1", 99999)


def test_the_cache_is_given_before_the_start(checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    arguments, environment = plan(ServeSettings(checkpoint=checkpoints["plain"], extra=["--max-num-seqs", "2"]))
    assert 0 < int(value_of(arguments, "--kv-cache-memory-bytes")) < 2**30
    line = _what_is_on(ServeSettings(checkpoint=checkpoints["plain"]), environment, arguments, key=False)
    assert (
        "http://127.0.0.1:8000/v1" in line
        and re.search(r"cache [1-9]\d* MiB", line)
        and " tokens" in line
        and "no key" in line
    )
    secure = ServeSettings(checkpoint=checkpoints["plain"], extra=["--ssl-certfile", "x"])
    assert _what_is_on(secure, environment, arguments, key=True).startswith("https://127.0.0.1:8000/v1")
    with pytest.raises(ConfigError, match="are free"):
        plan(ServeSettings(checkpoint=checkpoints["plain"], memory="900GB"))


def test_heads_that_the_cpu_kernels_do_not_take_are_refused_before_the_start(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    config = {**TINY_LLM, "hidden_size": 80}  # two heads of 40
    language_model = {"config": config, "tokenizer": str(tmp_path / "made")}
    model, processor = tiny_model(tmp_path / "made", language_model=language_model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="heads of 40"):
        serve(ServeSettings(checkpoint=str(tmp_path)))


def test_a_server_that_others_could_reach_without_a_key_is_refused_before_anything_heavy_is_read(tmp_path):
    """It took the imports of a whole start."""
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys\nfrom mllm.cli.main import main\nsys.argv = ['mllm', 'serve', sys.argv[1], '--host', '0.0.0.0']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'vllm' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--host 0.0.0.0 is reachable from outside" in done.stderr, done.stderr
    assert done.stdout.split() == ["2", "False", "False"]
