"""With which settings does a checkpoint go online? vLLM's OpenAI-compatible server, started with safe defaults."""

from __future__ import annotations

import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mllm.config import StrictModel
from mllm.damage import opening
from mllm.errors import ConfigError
from mllm.heads.codes.settings import vllm_environment, vllm_options
from mllm.models.engine_limits import check_engine_heads
from mllm.models.engine_memory import ENGINES, engines_of, memory_arguments, need_of, seats_of, size_text
from mllm.processing.engine_videos import engine_options
from mllm.processing.frames import video_spec
from mllm.serve.adapters import (
    BESIDE_HEADS,
    SETTING,
    adapter_arguments,
    named_adapters,
    skips_visual_weights,
    visual_adapters,
)
from mllm.serve.heads import HEADS_ENVIRONMENT, READER, WORKER, served_heads
from mllm.serve.http.keys import CLIENTS, FILE, LOOPBACK, OPERATOR, read_clients
from mllm.serve.http.settings import ENVIRONMENT, AdmissionSettings
from mllm.serve.images.requests import SCHEDULER, refusal
from mllm.serve.options import check_extra, check_folder, check_start, vllm_source_has, written_out
from mllm.serve.supervisor import ENVIRONMENT as SUPERVISOR

NO_DOMAIN = "no-media-domain.invalid"
"""Matches no host (RFC 2606): vLLM takes an empty list of media domains for "every host"."""

_OWN_PROCESSES = (
    "--api-server-count",
    "-asc",
    "--headless",
    "--pipeline-parallel-size",
    "-pp",
    "--uds",
)
"""vLLM's options that say how many processes take requests, or on which it decides that itself."""
KEEP_ALIVE = ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
"""Seconds that a resting connection is kept. Longer than proxies (nginx: 60) and clients keep theirs: with vLLM's 5 they send a request
where the server is just hanging up, and a POST that fails so is not sent again."""
SALT = "MLLM_CACHE_SALT"
"""Environment variable: what cache names are made with, where several servers share a cache; default: a new one each."""


class ServeSettings(StrictModel):
    """Settings of ``mllm serve``; ``extra`` goes to vLLM as it is, after everything else."""

    checkpoint: str
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    name: str | None = Field(default=None, min_length=1)
    """Model name in requests; default: the checkpoint's folder name."""
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, gt=0)
    max_images: int = Field(default=8, ge=0)
    max_videos: int = Field(default=2, ge=0)
    """Most videos of a request, where the model takes any."""
    max_pixels: int = Field(default=16_000_000, gt=0)
    max_drawings: int = Field(default=4, ge=1)
    """Most pictures that one request to ``/v1/images/generations`` may ask for."""
    max_body_mb: float = Field(default=32.0, gt=0)
    media_domains: list[str] = Field(default_factory=list)
    media_timeout: float = Field(default=5.0, gt=0)
    """Seconds that a host of ``media_domains`` has for a picture."""
    keys: str | None = None
    """File of clients with keys and limits (`mllm.serve.http.keys.read_clients`)."""
    tensor_parallel: int = Field(default=1, ge=1)
    memory: str | None = None
    """What the engine may take of the GPU's memory, or of the machine's without one: a share (0.5) or a size (8GB)."""
    eager: bool = False
    shutdown_timeout: float = Field(default=25.0, ge=0)
    """Seconds that running requests have to finish once the server is told to stop."""
    verbose: bool = False
    """Show what vLLM writes; else it goes to a log file."""
    backend: Literal["auto", "native", "transformers"] = "auto"
    lora: list[str] = Field(default_factory=list)
    """``name=folder`` of PEFT adapters, served unmerged."""
    extra: list[str] = Field(default_factory=list)


def plan(settings: ServeSettings, api_key: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Arguments of ``vllm serve`` and environment variables to set. Reads the checkpoint's configs; starts nothing.

    Raises `ConfigError` for a checkpoint that is not ours or settings that do not fit it.
    """
    check_extra(settings.extra)
    settings = settings.model_copy(update={"extra": written_out(settings.extra)})
    check_folder(settings.checkpoint)
    config, generation = _read(settings.checkpoint)
    router = config.router
    if settings.backend == "transformers" and router is not None:
        raise ConfigError(
            "--backend transformers: this checkpoint routes images by the question, which vLLM's Transformers backend "
            "does not hand to encoders; use --backend native"
        )
    routed = router is not None
    arguments = [settings.checkpoint, "--host", settings.host, "--port", str(settings.port)]
    name = settings.name or Path(settings.checkpoint.rstrip("/")).name
    arguments += ["--served-model-name", name]
    arguments += ["--dtype", settings.dtype, "--seed", "0", "--chat-template-content-format", "openai"]
    for option, value in engine_options(config, images=settings.max_images, videos=settings.max_videos).items():
        arguments += [f"--{option.replace('_', '-')}", json.dumps(value)]
    arguments += ["--allowed-media-domains", NO_DOMAIN]  # pictures are fetched before the engine, and judged there
    arguments += ["--middleware", "mllm.serve.http.admission.Admission"]
    arguments += ["--worker-extension-cls", WORKER]
    if settings.backend != "auto":
        arguments += ["--model-impl", {"native": "vllm"}.get(settings.backend, settings.backend)]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if settings.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(settings.tensor_parallel)]
        if settings.backend != "transformers":
            arguments += ["--mm-encoder-tp-mode", "data"]  # every GPU has all encoders: they share the images
    seats = seats_of(settings.extra)
    need = need_of(settings.checkpoint, config, dtype=settings.dtype, length=settings.max_model_len, seats=seats)
    if config.drawing_head is not None and refusal(config) is not None:
        need = replace(need, weights=2 * need.weights)  # the model itself draws, beside the engine
    arguments += memory_arguments(need, settings.memory, settings.extra)[0]
    if settings.eager:
        arguments += ["--enforce-eager"]
    greedy = not generation.get("do_sample", False)
    if greedy:  # vLLM reads temperatures, but not do_sample: greedy must be said
        arguments += ["--override-generation-config", json.dumps({"temperature": 0.0})]
    if vllm_source_has("enable_offline_docs", "entrypoints/**/cli_args.py"):
        arguments += ["--enable-offline-docs"]  # else /docs loads its script from another host
    if (routed or settings.lora or _has(settings.extra, "--enable-lora")) and vllm_source_has(
        "trust_request_mm_kwargs", "entrypoints/**/cli_args.py"
    ):
        arguments += ["--trust-request-mm-kwargs"]  # nothing but checked experts is admitted
    if not _has(settings.extra, "--allowed-origins"):
        arguments += ["--allowed-origins", "[]"]
    if not _has(settings.extra, "--structured-outputs-config"):
        # Between the parts of a JSON answer a small model may write white space to the end of its tokens.
        compact = {"backend": "xgrammar", "disable_any_whitespace": True}
        arguments += ["--structured-outputs-config", json.dumps(compact)]
    draws = config.drawing_head is not None
    in_engine = draws and refusal(config) is None and settings.backend != "transformers"
    engine = vllm_options(config, draws=settings.backend != "transformers")
    drafts = _has(settings.extra, "--speculative-config") and not in_engine  # vLLM takes no processors beside it
    heads = served_heads(config.heads) if settings.backend != "transformers" and not drafts else None
    if heads is not None:
        engine["logits_processors"] = [*engine.get("logits_processors", ()), READER]
    if engine and not drafts:  # else the model does what they do
        arguments += ["--logits-processors", *engine["logits_processors"]]
    if in_engine:  # a guided drawing is two requests in step
        arguments += ["--scheduler-cls", SCHEDULER, "--no-async-scheduling"]
    visual = _adapted(settings, heads is not None)
    arguments += adapter_arguments(settings.lora)
    if settings.lora or _has(settings.extra, "--enable-lora"):
        folders = named_adapters(settings.lora)
        arguments += [
            "--additional-config",
            json.dumps({SETTING: {str(n): folders[name] for name, n in visual.items()}}),
        ]
    changing = bool(os.environ.get(OPERATOR) and (settings.lora or _has(settings.extra, "--enable-lora")))
    if changing:
        arguments += _one_process(settings.extra)
    alone = changing or (
        draws and not in_engine
    )  # adapters are loaded into one process; each would read the model to draw
    spread = any(option.startswith(("--data-parallel-", "-dp")) and not _is_size(option) for option in settings.extra)
    if not alone and not spread and not any(_has(settings.extra, option) for option in _OWN_PROCESSES):
        arguments += _processes(settings)
    film = video_spec(config.video)
    admission = AdmissionSettings(
        max_body_bytes=int(settings.max_body_mb * 2**20),
        media_domains=settings.media_domains,
        media_timeout=settings.media_timeout,
        max_images=settings.max_images,
        max_videos=0 if film is None else settings.max_videos,
        max_seconds=0.0 if film is None else film.max_seconds,
        max_frames=0 if film is None else film.most,
        timed=film is not None and film.tells_seconds,
        whole=film is not None and film.which == "space_aware",
        video=None if film is None else film.model_dump(),
        max_pixels=settings.max_pixels,
        image_token=_image_token(settings.checkpoint),
        image_token_id=config.image_token_id,
        greedy=greedy,
        loopback=not (api_key or settings.keys) and settings.host in LOOPBACK,
        router=router,
        checkpoint=settings.checkpoint if draws else None,
        draws_beside=draws and not in_engine,
        max_drawings=settings.max_drawings,
        heads=heads,
        name=name,
        adapters=list(named_adapters(settings.lora)),
        visual_adapters=visual,
        salt=_salt(settings.extra),
    )
    environment = {
        ENVIRONMENT: admission.model_dump_json(),
        "VLLM_MAX_IMAGE_PIXELS": str(settings.max_pixels),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        KEEP_ALIVE[0]: os.environ.get(*KEEP_ALIVE),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        **{name: os.environ.get(name, value) for name, value in vllm_environment(engine).items()},
    }
    if heads is not None:
        environment |= HEADS_ENVIRONMENT
    if api_key:
        environment[CLIENTS] = api_key
    if settings.keys:
        read_clients(settings.keys)
        environment[FILE] = str(Path(settings.keys).expanduser().resolve())
    if changing:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # routes of the operator's
    return [*arguments, *settings.extra], environment


def serve(settings: ServeSettings) -> None:
    """Become vLLM's server process; does not return. The API key comes from the environment, ``MLLM_API_KEY``."""
    check_start(settings.host, settings.keys)
    api_key = os.environ.get(CLIENTS) or os.environ.pop("VLLM_API_KEY", None)
    os.environ.pop("VLLM_API_KEY", None)  # vLLM would check one key itself, on some of the routes only
    settings = settings.model_copy(update={"extra": written_out(settings.extra)})
    arguments, environment = plan(settings, api_key)
    check_engine_heads(settings.checkpoint, _read(settings.checkpoint)[0])
    import torch

    if torch.cuda.is_available():  # the CPU only prepares pictures; with a thread per core small operations wait for it
        environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    os.environ.update(environment)
    sys.stdout.flush()
    # The command, not the server's module: it alone starts several processes for HTTP and pictures (--api-server-count).
    command = [sys.executable, "-m", "mllm.serve.vllm.command", "serve", *arguments]
    os.environ[SUPERVISOR] = json.dumps(
        {
            "command": command,
            "address": _address(settings),
            "ready": _what_is_on(settings, environment, arguments, bool(api_key or settings.keys)),
            "shutdown_timeout": settings.shutdown_timeout,
            "verbose": settings.verbose,
        }
    )
    os.execv(sys.executable, [sys.executable, "-m", "mllm.serve.supervisor"])


def http_processes(cores: int, gpus: int, max_pixels: int, engines: int = 1) -> int:
    """How many processes take requests and prepare their pictures before engines on ``gpus`` GPUs.

    Four take 38.95 requests a second of a 640×480 picture for two encoders, 0.98 of what the engine does without HTTP
    (one H200, 7B; `benchmarks/results/serve_http_h200.txt`); fewer and more were not measured with a client that is fast
    enough. Several engines behind one address get as many each. Cores are left to the engines and a worker for each GPU;
    larger pictures take longer.
    """
    spare = cores - engines - gpus
    wanted = engines * (2 if max_pixels <= 1_000_000 else 4)
    return max(1, min(wanted, spare // 2))


def _has(extra: list[str], option: str) -> bool:
    """Whether vLLM's own option was given."""
    return any(one == option or one.startswith((f"{option}=", f"{option}.")) for one in extra)


def _processes(settings: ServeSettings) -> list[str]:
    """vLLM's argument for `http_processes`; on a CPU the cores are the engine's."""
    import torch

    if not torch.cuda.is_available():
        return []
    engines = engines_of(settings.extra)
    gpus = settings.tensor_parallel * engines
    count = http_processes(len(os.sched_getaffinity(0)), gpus, settings.max_pixels, engines)
    return ["--api-server-count", str(count)] if count > engines else []


def _is_size(option: str) -> bool:
    """Whether an argument says how many engines stand behind one address; others of its kind spread them over machines."""
    return option.partition("=")[0] in ENGINES


def _adapted(settings: ServeSettings, heads: bool) -> dict[str, int]:
    """Adapters that change encoders or the connector, and their numbers. Raises `ConfigError` where these could not be told apart
    from the others, or would be left out without a word."""
    for option in ("--lora-modules", "--additional-config"):
        if _has(settings.extra, option) and (settings.lora or _has(settings.extra, "--enable-lora")):
            raise ConfigError(
                f"{option}: adapters are given by --lora name=folder, by which vLLM is told what they change"
            )
    visual = visual_adapters(settings.lora)
    if not visual:
        return {}
    first = next(iter(visual))
    if heads:
        raise ConfigError(f"--lora {first}: {BESIDE_HEADS}")
    if settings.backend == "transformers":
        raise ConfigError(f"--lora {first}: it changes encoders or the connector, which --backend native serves only")
    if not skips_visual_weights():
        raise ConfigError(f"--lora {first}: it changes encoders or the connector, which this vLLM cannot leave to mllm")
    return visual


def _one_process(extra: list[str]) -> list[str]:
    """vLLM's argument for one process that takes requests, however many engines: an adapter is loaded into the process that is
    asked to, and the others would answer that there is none. Raises `ConfigError` where several are asked for."""
    for place, option in enumerate(extra):
        name, _, value = option.partition("=")
        if name in ("--api-server-count", "-asc"):
            value = value or (extra[place + 1] if place + 1 < len(extra) else "")
            if value != "1":
                raise ConfigError(
                    f"{name} {value}: with {OPERATOR} adapters are loaded while the server runs, into one process for requests; "
                    f"leave out {name}, or unset {OPERATOR}"
                )
            return []
    return ["--api-server-count", "1"] if any(_is_size(option) for option in extra) else []


def _reachable(host: str) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _address(settings: ServeSettings) -> str:
    """Where this machine reaches the server."""
    scheme = "https" if _has(settings.extra, "--ssl-certfile") else "http"
    return f"{scheme}://{_reachable(settings.host)}:{settings.port}"


def _what_is_on(settings: ServeSettings, environment: dict[str, str], arguments: list[str], key: bool) -> str:
    """The address, the limits and what is on, on one line."""
    admission = AdmissionSettings.model_validate_json(environment[ENVIRONMENT])
    said = [f"{_address(settings)}/v1", f"model {admission.name}"]
    said.append(f"{settings.max_images} pictures a request of {settings.max_pixels / 1e6:g} megapixels each")
    if admission.max_videos:
        said.append(f"{admission.max_videos} videos of up to {admission.max_seconds / 60:g} minutes")
    text = _read(settings.checkpoint)[0].get_text_config()
    length = settings.max_model_len or getattr(text, "max_position_embeddings", None)
    said += [f"{length} tokens"] if length else []
    if "--kv-cache-memory-bytes" in arguments:
        said.append(f"cache {size_text(int(arguments[arguments.index('--kv-cache-memory-bytes') + 1]))}")
    if "--gpu-memory-utilization" in arguments:
        said.append(f"{float(arguments[arguments.index('--gpu-memory-utilization') + 1]):.0%} of the GPU")
    if admission.router is not None:
        said.append(f"{admission.router['type']} router over {', '.join(admission.router['experts'])}")
    said += ["draws"] if admission.checkpoint else []
    if admission.heads is not None:
        said += ["masks"] * (admission.heads.mark is not None) + ["probabilities"] * admission.heads.probability
    elif served_heads(_read(settings.checkpoint)[0].heads) is not None:
        said.append(
            "no masks or probabilities beside the text: vLLM's Transformers backend and drafts keep no states for heads"
        )
    said += [f"{len(settings.lora)} adapters"] if settings.lora else []
    said += [f"fetches from {', '.join(settings.media_domains)}"] if settings.media_domains else []
    said.append("with a key" if key else "no key: everybody on this machine may ask")
    return " · ".join(said)


def _read(checkpoint: str) -> tuple[Any, dict[str, Any]]:
    """Config of ours and generation settings of a checkpoint."""
    from transformers import AutoConfig, GenerationConfig

    from mllm.models.configuration_mllm import MllmConfig

    try:
        with opening(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        missing = "" if Path(checkpoint).exists() else "no such folder, and "
        raise ConfigError(
            f"{checkpoint}: {missing}no checkpoint that can be read ({str(error).splitlines()[0][:200]})"
        ) from error
    if not isinstance(config, MllmConfig):
        raise ConfigError(
            f"{checkpoint}: a {config.model_type} checkpoint, not one of mllm; `mllm convert` makes one of LLaVA and "
            "Prismatic"
        )
    if config.connector is None:
        raise ConfigError(f"{checkpoint}: a text-only model; serve its language model with vLLM itself")
    try:
        generation = GenerationConfig.from_pretrained(checkpoint).to_dict()
    except OSError:
        generation = {}
    return config, generation


def _salt(extra: list[str]) -> str:
    """What cache names are made with, where it is given; servers that hand features to one another must share it."""
    if salt := os.environ.get(SALT):
        return salt
    if any(option.startswith(("--ec-transfer-config", "--kv-transfer-config")) for option in extra):
        raise ConfigError(f"servers that share features need the same secret in the environment variable {SALT}")
    return secrets.token_hex(16)


def _image_token(checkpoint: str) -> str:
    from transformers import AutoProcessor

    with opening(checkpoint):
        return AutoProcessor.from_pretrained(checkpoint).image_token
