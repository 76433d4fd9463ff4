"""What does a Prometheus scrape learn beyond vLLM's own numbers? Refusals, running requests, experts, encoders."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

_REASONS = {
    400: "request",
    401: "key",
    404: "route",
    405: "method",
    408: "slow body",
    413: "large body",
    415: "media type",
    429: "limit",
    503: "going away",
}


@functools.cache
def _counters() -> Any:
    """The process's counters, made once; None without prometheus_client (vLLM brings it)."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return None
    return {
        "refused": Counter("mllm_refused_requests", "Requests that were refused", ["reason", "route"]),
        "pictures": Counter("mllm_pictures", "Pictures of admitted requests", ["route"]),
        "experts": Counter("mllm_chosen_experts", "How often a request or the language model chose it", ["expert"]),
        "client_requests": Counter("mllm_client_requests", "Requests of a client with a name", ["client"]),
        "client_tokens": Counter("mllm_client_tokens", "Tokens of a client with a name", ["client"]),
        "drawings": Counter("mllm_drawings", "Pictures that were drawn"),
    }


def count_refusal(status: int, route: str) -> None:
    """A request was refused. route: one of the server's routes, or "other"."""
    if counters := _counters():
        counters["refused"].labels(_REASONS.get(status, "engine"), route).inc()


def count_pictures(number: int, route: str) -> None:
    """A request with pictures was admitted."""
    if number and (counters := _counters()):
        counters["pictures"].labels(route).inc(number)


def count_experts(weights: Iterable[Mapping[str, float]]) -> None:
    """The routing of a request's pictures was decided before the engine."""
    if counters := _counters():
        for row in weights:
            for name in row or ("none",):
                counters["experts"].labels(name).inc()


def count_client(name: str, *, requests: int = 0, tokens: int = 0) -> None:
    """A client with a name asked, or was answered."""
    if counters := _counters():
        counters["client_requests"].labels(name).inc(requests)
        counters["client_tokens"].labels(name).inc(tokens)


def count_drawings(number: int) -> None:
    """Pictures were drawn."""
    if counters := _counters():
        counters["drawings"].inc(number)


def state_metrics(running: int, draining: bool) -> str:
    """What the server's processes share (`ServerState`) as Prometheus text; what waits in the engine is vLLM's own number."""
    rows = (
        ("mllm_running_requests", "Requests that have begun and not ended, in all processes", running),
        ("mllm_draining", "1 once the server was told to stop", int(draining)),
    )
    return "".join(
        f"# HELP {name} {help_text}\n# TYPE {name} gauge\n{name} {value}\n" for name, help_text, value in rows
    )


def encoder_metrics(workers: Iterable[Mapping[str, Mapping[str, float]]]) -> str:
    """The workers' clocks (`VisualStatistics`) as Prometheus text."""
    lines: dict[str, list[str]] = {"images": [], "seconds": []}
    for number, parts in enumerate(workers):
        for part, measured in parts.items():
            for what, kept in lines.items():
                kept.append(f'mllm_encoder_{what}_total{{part="{part}",worker="{number}"}} {measured[what]}')
    text = ""
    for what, help_text in (("images", "Pictures that a part of the model looked at"), ("seconds", "Time it took")):
        if lines[what]:
            name = f"mllm_encoder_{what}_total"
            text += f"# HELP {name} {help_text}\n# TYPE {name} counter\n" + "\n".join(lines[what]) + "\n"
    return text
