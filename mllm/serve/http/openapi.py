"""What does the server say of itself in OpenAPI? The routes and fields that it really takes, described as the engine does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mllm.serve.http.fields import DOCS, DRAW, INFORMATION, OPEN, OPENAPI, READ, ROUTES, STATISTICS

_OWN = {
    INFORMATION: "Pictures a request, experts, who routes them, and whether the model draws",
    STATISTICS: "Pictures and seconds of every encoder and the connector, by worker",
}
_EXPERTS = {
    "type": "object",
    "properties": {
        "experts": {"description": "Names, name → weight, or one of these for every picture; 'none' runs no expert"}
    },
    "additionalProperties": False,
}
_SCHEMAS = "#/components/schemas/"
PAGE = b"""<!DOCTYPE html>
<html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mllm</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="static/swagger-ui.css"></head>
<body><div id="page"></div><script src="static/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#page"})</script></body></html>
"""
"""The document as a page, with the script that vLLM ships: nothing of it comes from another host."""


def describe(engine: Mapping[str, Any], *, name: str, draws: bool, keys: bool) -> dict[str, Any]:
    """The document. engine: the one of vLLM's app, with every route it has and every field it reads; name: the model's; draws,
    keys: whether the server draws, and asks for a key."""
    paths: dict[str, Any] = {}
    given = engine.get("paths", {})
    schemas = copy.deepcopy(dict(engine.get("components", {}).get("schemas", {})))
    for path in sorted(ROUTES):
        if path == DRAW:
            continue
        if "post" in given.get(path, {}):
            paths[path] = {"post": _narrowed(copy.deepcopy(given[path]["post"]), path, schemas)}
    for path in sorted(READ - {OPENAPI, DOCS}):
        if "get" in given.get(path, {}):
            paths[path] = {"get": copy.deepcopy(given[path]["get"])}
    for path, summary in _OWN.items():
        paths[path] = {"get": {"summary": summary, "responses": _answers("application/json")}}
    if draws:
        paths[DRAW] = {"post": _drawing(schemas)}
    if keys:
        for path, methods in paths.items():
            for method in methods.values():
                method["security"] = [] if path in OPEN else [{"key": []}]
    components: dict[str, Any] = {"schemas": _used(paths, schemas)}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": engine.get("openapi", "3.1.0"),
        "info": {
            "title": f"mllm: {name}",
            "version": "1",
            "description": "Routes and fields that are not here are refused.",
        },
        "paths": paths,
        "components": components,
    }


def _narrowed(operation: dict[str, Any], path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """A route's description with those fields of its body that the server takes; its schema gets a name of its own."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    variants: list[dict[str, Any]] = body.get("schema", {}).get("anyOf") or [body.get("schema", {})]
    known = ROUTES[path].passed | ROUTES[path].dropped
    for variant in variants:
        reference = variant.get("$ref", "")
        schema = copy.deepcopy(schemas.get(reference.removeprefix(_SCHEMAS)))
        if schema is None:
            continue
        schema["properties"] = {field: value for field, value in schema.get("properties", {}).items() if field in known}
        if "mm_processor_kwargs" in schema["properties"]:
            schema["properties"]["mm_processor_kwargs"] = _EXPERTS
        schema["additionalProperties"] = False
        own = f"{reference.removeprefix(_SCHEMAS)}.{path.strip('/').replace('/', '.')}"
        schemas[own] = schema
        variant["$ref"] = _SCHEMAS + own
    return operation


def _drawing(schemas: dict[str, Any]) -> dict[str, Any]:
    from mllm.serve.images.api import ImagesRequest

    schema = ImagesRequest.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas["ImagesRequest"] = schema
    body = {"content": {"application/json": {"schema": {"$ref": _SCHEMAS + "ImagesRequest"}}}, "required": True}
    return {"summary": "Draw pictures", "requestBody": body, "responses": _answers("application/json")}


def _answers(kind: str) -> dict[str, Any]:
    return {"200": {"description": "The answer", "content": {kind: {}}}}


def _used(paths: dict[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas that the routes lead to."""
    found: dict[str, Any] = {}
    waiting: list[Any] = [paths]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix(_SCHEMAS)
            if name in schemas and name not in found:
                found[name] = schemas[name]
                waiting.append(schemas[name])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return dict(sorted(found.items()))
