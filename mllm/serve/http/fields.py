"""Which routes does the server answer, and which fields may a request to each have?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.errors import did_you_mean
from mllm.serve.http.errors import Refused, shown

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE, DRAW = "/tokenize", "/detokenize", "/v1/images/generations"
STATISTICS, INFORMATION, METRICS = "/mllm/stats", "/mllm/info", "/metrics"
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
OPENAPI, DOCS = "/openapi.json", "/docs"
OPEN = frozenset({"/health", "/ping"})
"""Answered without a key, so that a load balancer needs none."""
READ = OPEN | {
    STATISTICS, INFORMATION, "/v1/models", METRICS, "/version", "/load", OPENAPI, DOCS,
}  # fmt: skip
"""GET routes for every client; any other is the operator's."""
STATIC = "/static/"


@dataclass(frozen=True)
class Fields:
    """What may stand at the top of a request: handed on, or left out because no answer depends on it."""

    passed: frozenset[str]
    dropped: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLING = _names(
    "temperature top_p top_k min_p n stop seed stream stream_options frequency_penalty presence_penalty "
    "repetition_penalty length_penalty logit_bias min_tokens max_tokens stop_token_ids "
    "include_stop_str_in_output ignore_eos skip_special_tokens spaces_between_special_tokens bad_words allowed_token_ids "
    "prompt_logprobs logprobs logprob_token_ids truncate_prompt_tokens truncation_side repetition_detection "
    "stream_interval thinking_token_budget"
)
_ANSWER = _names(
    "response_format structured_outputs return_tokens_as_token_ids return_token_ids echo add_special_tokens"
)
_ORDER = _names("model priority cache_salt request_id")
_PROMPT = _names(
    "messages tools chat_template_kwargs add_generation_prompt continue_final_message add_special_tokens mm_processor_kwargs"
)
_ACCOUNTS = _names(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity"
)
_ANTHROPIC = _names("model messages system tools tool_choice thinking")

ROUTES: dict[str, Fields] = {
    CHAT: Fields(
        _SAMPLING | _ANSWER | _ORDER | _PROMPT | _names(
            "max_completion_tokens top_logprobs tool_choice parallel_tool_calls reasoning_effort include_reasoning "
            "documents return_prompt_text"
        ),
        _ACCOUNTS | {"modalities"},
    ),
    COMPLETIONS: Fields(_SAMPLING | _ANSWER | _ORDER | {"prompt"}, _ACCOUNTS),
    RESPONSES: Fields(
        _ORDER | _names(
            "input instructions max_output_tokens max_tool_calls parallel_tool_calls reasoning include_reasoning stream "
            "stream_options temperature text tool_choice tools top_logprobs top_p top_k min_p truncation logit_bias "
            "skip_special_tokens include_stop_str_in_output presence_penalty frequency_penalty repetition_penalty seed "
            "stop ignore_eos structured_outputs mm_processor_kwargs include"
        ),
        _ACCOUNTS | {"background"},
    ),
    MESSAGES: Fields(
        _ANTHROPIC | _names("max_tokens stop_sequences stream temperature top_k top_p output_config"),
        _names("metadata service_tier"),
    ),
    COUNT: Fields(_ANTHROPIC, _names("metadata")),
    TOKENIZE: Fields(_PROMPT | _names("model prompt return_token_strs")),
    DETOKENIZE: Fields(_names("model tokens")),
    DRAW: Fields(
        _names("prompt model n size cfg_scale temperature top_k top_p seed response_format output_format quality style "
               "background moderation stream output_compression partial_images decoder steps guidance"),
        _names("user"),
    ),
}  # fmt: skip
"""POST routes for every client; any other is the operator's."""

_OBJECTS = _names(
    "response_format structured_outputs stream_options mm_processor_kwargs chat_template_kwargs output_config thinking "
    "reasoning text"
)
"""Fields that must hold an object; vLLM stumbles over anything else with a 500."""
_OFF = (("use_beam_search", False), ("best_of", 1))
"""Sent by clients that say their defaults, and the only value that means anything here."""
_HINTS = {
    "experts": 'experts stand in mm_processor_kwargs: {"experts": […]}',
    "uuid": "pictures are cached by their content only",
    "media_io_kwargs": "pictures are read as in training",
    "vllm_xargs": "these are the server's own",
    "chat_template": "the checkpoint's own template is used",
    "prompt_embeds": "embeddings are not served",
    "kv_transfer_params": "these are the server's own",
    "ec_transfer_params": "these are the server's own",
    "previous_response_id": "answers are not kept; send the conversation",
    "use_beam_search": "beams are chosen from raw log-probabilities, a picture's place among them; send n and a temperature",
    "best_of": "send n, and choose among its answers",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "guided_json": "send structured_outputs or response_format",
    "guided_choice": 'send structured_outputs: {"choice": […]}',
    "guided_regex": 'send structured_outputs: {"regex": …}',
    "guided_grammar": 'send structured_outputs: {"grammar": …}',
}


def admitted_fields(path: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the route knows. Raises `Refused` for another one, unless it is null, which means "not sent"."""
    known = ROUTES[path]
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in known.passed:
            kept[name] = value
        elif value is not None and name not in known.dropped and (name, value) not in _OFF:
            raise Refused(400, f"{shown(name)} is not a field of {path}{_hint(name, known)}")
    for name in _OBJECTS & (kept.keys() - _not_objects(path)):
        if kept[name] is not None and not isinstance(kept[name], dict):
            raise Refused(400, f"{name} must be an object")
    _check_dropped(path, data)
    return kept


def _not_objects(path: str) -> frozenset[str]:
    return frozenset({"response_format"}) if path == DRAW else frozenset()


def _hint(name: str, known: Fields) -> str:
    if name in _HINTS:
        return f": {_HINTS[name]}"
    return did_you_mean(name, sorted(known.passed)) if len(name) < 60 else ""


def _check_dropped(path: str, data: Mapping[str, Any]) -> None:
    """What is left out must not have meant anything."""
    if path == CHAT and data.get("modalities") not in (None, ["text"]):
        raise Refused(400, 'modalities: this server answers with text; send ["text"] or nothing')
    if path == RESPONSES and data.get("background"):
        raise Refused(400, "background: answers are not kept; ask with stream or wait for the answer")
