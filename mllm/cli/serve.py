"""``mllm serve``: put a checkpoint behind an OpenAI-compatible server."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder (or hub id).")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but loopback needs MLLM_API_KEY in the environment.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in requests; default: the folder's name.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    max_images: Annotated[int, typer.Option(help="Pictures per request.")] = 8,
    max_videos: Annotated[int, typer.Option(help="Videos per request, where the model takes any.")] = 2,
    max_pixels: Annotated[
        int, typer.Option(help="Largest picture, width × height; read before anything is decoded.")
    ] = 16_000_000,
    max_drawings: Annotated[
        int, typer.Option(help="Drawings per request to /v1/images/generations (models that draw).")
    ] = 4,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body, in MiB.")] = 32.0,
    media_domain: Annotated[
        list[str] | None,
        typer.Option(help="Host whose pictures may be fetched by address (repeatable). Default: none, base64 only."),
    ] = None,
    media_timeout: Annotated[float, typer.Option(help="Seconds such a host has for a picture.")] = 5.0,
    keys: Annotated[
        str | None,
        typer.Option(
            help="YAML file of clients, each with a key and what it may use in a minute: "
            "team-a: {key: …, requests: 60, pictures: 120, tokens: 100000}."
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the language model.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the engine may take of the GPU's memory (of the machine's without one): 0.5, 50% or 8GB. Default: "
            "what is free, at most 92 % of a GPU; on a CPU a cache for all requests at once, at most half of what is free."
        ),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="No compilation and no CUDA graphs: starts sooner, answers slower.")
    ] = False,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests have to finish after SIGTERM or Ctrl-C.")
    ] = 25.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what vLLM writes; else it goes to a log file.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="auto, native, or transformers (vLLM's Transformers modeling backend).")
    ] = "auto",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="name=folder of a PEFT adapter, of the language model, encoders or connector (repeatable)."),
    ] = None,
) -> None:
    """Serve a checkpoint; what follows -- goes to vLLM unchanged.

    [dim]MLLM_API_KEY=secret mllm serve runs/demo/final --port 8000 -- --max-num-seqs 64[/]

    [dim]mllm serve CKPT -- --quantization fp8[/] · the encoders compiled:
    [dim]-- --compilation-config '{"compile_mm_encoder": true}'[/]
    """
    if (
        os.getpid() == 1
    ):  # the first process of a container hears no SIGTERM without a handler; the supervisor has its own
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    arguments.checkpoint(checkpoint, whole=True)
    arguments.dtype(dtype)
    arguments.one_of(backend, ("auto", "native", "transformers"), "--backend")
    for adapter in lora or []:
        if not (place := adapter.partition("=")[2]):
            raise ConfigError(f"--lora {adapter}: expected name=folder")
        arguments.folder_of(Path(place), "a PEFT adapter", "adapter_config.json")
    from mllm.serve.options import check_extra, check_port, check_start, check_values

    check_extra(list(context.args))
    check_values(memory, keys, media_domain or [])
    check_start(host, keys)
    if not any(option.startswith(("--uds", "--headless")) for option in context.args):
        check_port(host, port)
    from mllm.config import validate
    from mllm.serve.server import ServeSettings
    from mllm.serve.server import serve as start

    settings = validate(
        ServeSettings,
        {
            "checkpoint": checkpoint,
            "host": host,
            "port": port,
            "name": name,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_images": max_images,
            "max_videos": max_videos,
            "max_pixels": max_pixels,
            "max_drawings": max_drawings,
            "max_body_mb": max_body_mb,
            "media_domains": media_domain or [],
            "media_timeout": media_timeout,
            "keys": keys,
            "tensor_parallel": tensor_parallel,
            "memory": memory,
            "eager": eager,
            "shutdown_timeout": shutdown_timeout,
            "verbose": verbose,
            "backend": backend,
            "lora": lora or [],
            "extra": list(context.args),
        },
        where="serve",
    )
    start(settings)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)
