"""How is a declaration (YAML, JSON, overrides) read, checked and turned into a strict config?"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mllm.errors import ConfigError, did_you_mean


class StrictModel(BaseModel):
    """Base of every config and specification: unknown keys are errors, values are validated on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    renamed: ClassVar[Mapping[str, str]] = {}
    """Key of an earlier version → what is written now; the error for the old one says so."""


S = TypeVar("S", bound=BaseModel)
CURE = "`mllm convert OLD.yaml NEW.yaml` rewrites a whole file"
_FORMER_VALUES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, and reads 1e-3 as a number (YAML 1.1 does not)."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    written: set = set()
    for key_node, _ in node.value:
        key = None if key_node.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key_node, deep=True)
        if key in written:
            raise ConfigError(f"key {key!r} appears twice (line {key_node.start_mark.line + 1})")
        written.add(key)
    loader.flatten_mapping(node)  # merged keys (<<) come first, so a key written here overrides them
    return {
        loader.construct_object(key_node, deep=True): loader.construct_object(value_node, deep=True)
        for key_node, value_node in node.value
    }


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str = "YAML") -> Any:
    """Parse YAML text. Raises `ConfigError` that starts with ``where``."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file. Raises `ConfigError` naming the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return parse_yaml(text, where=str(path))


def validate(model: type[S], data: Any, *, where: str = "") -> S:
    """Build ``model`` from plain data. Every problem becomes one line: path to the key, what is wrong, what was meant."""
    if isinstance(data, model):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or model.__name__}: expected a mapping of keys, got {type(data).__name__}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(model, problem, where, data) for problem in _telling(error.errors(), data))
        ) from None


def _telling(problems: Sequence[Any], data: Any) -> list[Any]:
    """The problems without those of other forms that a key could have: of ``lr`` alone or a mapping with ``lr``, the form that was
    written; of a choice of words, the words. The names that pydantic gives the forms stand in no path."""
    forms: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    told: list[Any] = []
    for problem in problems:
        place = _form_in(problem["loc"], data)
        if place is None:
            told.append(problem)
            continue
        location, form = problem["loc"][:place], problem["loc"][place]
        plain = {**problem, "loc": (*location, *problem["loc"][place + 1 :])}
        known = forms.setdefault(location, {})
        if not known:
            told.append((location, known))
        known.setdefault(form, []).append(plain)
    return [one for each in told for one in ([each] if isinstance(each, dict) else _closest(each[1]))]


def _form_in(location: Sequence[Any], data: Any) -> int | None:
    """Where a path to a key names the form of a value, and no key that is written there."""
    node = data
    for place, part in enumerate(location):
        if (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]
        else:
            looks = isinstance(part, str) and (part in _FORMS or part.startswith("literal[") or part[:1].isupper())
            return place if looks and place else None
    return None


_FORMS = ("bool", "int", "float", "str")
"""What pydantic calls forms that are no class and no choice of words."""


def _closest(forms: Mapping[str, list[Any]]) -> list[Any]:
    """What is wrong with the form that was meant: a mapping's own keys before its being no number, words before its being no flag."""
    deep = [
        found for form, found in forms.items() if form[:1].isupper() and any(p["type"] != "model_type" for p in found)
    ]
    if deep:
        renamed = [p for p in deep[0] if p["type"] == "extra_forbidden"]
        return renamed or deep[0]
    words = [found for form, found in forms.items() if form.startswith("literal[")]
    return (words or list(forms.values()))[0]


def _explain(model: type[BaseModel], problem: Any, where: str, data: Any) -> str:
    location = _named_items(data, problem["loc"])
    path = ".".join([*([where] if where else []), *location])
    if problem["type"] == "extra_forbidden":
        now = getattr(_model_at(model, problem["loc"][:-1]), "renamed", {}).get(location[-1])
        if now is not None:
            return f"{path}: this key is now {now}; {CURE}"
        known = _fields_at(model, problem["loc"][:-1])
        meant = _deeper(_model_at(model, problem["loc"][:-1]), location[-1]) or did_you_mean(location[-1], known)
        return f"{path}: unknown key{meant or '.'}" + (f" Known keys: {', '.join(known)}." if known else "")
    if problem["type"] == "missing":
        return f"{path}: this key is required"
    shown = repr(problem.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    if (now := _FORMER_VALUES.get(str(problem.get("input")))) is not None and f"'{now}'" in message:
        shown += f", which is now {now}"
    return f"{path}: {message}" + ("" if problem["type"] == "value_error" else f" (got {shown})")


def _named_items(data: Any, location: Sequence[Any]) -> list[str]:
    """The path to a key, with the items of lists by their ``name`` where they have one: ``stages.sft``, not ``stages.1``."""
    words, node = [], data
    for part in location:
        inside = isinstance(node, Mapping) or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        node = (node.get(part) if isinstance(node, Mapping) else node[part]) if inside else None  # type: ignore[index]
        name = node.get("name") if isinstance(node, Mapping) and isinstance(part, int) else None
        words.append(name if isinstance(name, str) and name else str(part))
    return words


def _deeper(model: type[BaseModel] | None, key: str) -> str:
    """Where a key that was written one storey too high belongs; an empty string when nowhere."""
    for name, field in (model.model_fields if model else {}).items():
        below = _model_in(field.annotation)
        if below is not None and key in below.model_fields:
            one = "<name>." if get_origin(field.annotation) in (list, dict) else ""
            return f"; it is a key of {name}: {name}.{one}{key}."
    return ""


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Field names of the nested model that ``location`` points into; the outermost model's when it cannot be told."""
    found = _model_at(model, location)
    return list(found.model_fields) if found is not None else []


def _model_at(model: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return None
        field = current.model_fields.get(str(part))
        if field is not None:
            current = _model_in(field.annotation)
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first nested model that an annotation (optional, list or dict of one) names."""
    candidates = [annotation]
    while candidates:
        one = candidates.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
        candidates.extend(getattr(one, "__args__", ()))
    return None


def apply_overrides(data: dict, overrides: Sequence[str]) -> dict:
    """Apply ``a.b.c=value`` (YAML value; list positions as numbers) to a nested dict, in place; returns it.

    Raises `ConfigError` for a malformed override or a path through something that holds no keys.
    """
    for override in overrides:
        path, separator, value = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        keys = path.split(".")
        node: Any = data
        for depth, key in enumerate(keys):
            here = ".".join(keys[: depth + 1])
            if isinstance(node, list):
                names = [item.get("name") if isinstance(item, Mapping) else None for item in node]
                if key in names:
                    position = names.index(key)
                elif key.lstrip("-").isdigit() and -len(node) <= int(key) < len(node):
                    position = int(key)
                else:
                    known = [str(n) for n in names if n] or [f"0 to {len(node) - 1}"]
                    raise ConfigError(
                        f"override {here}: no such item{did_you_mean(key, known)}. Known: {', '.join(known)}"
                    )
                key = position  # type: ignore[assignment]
            elif not isinstance(node, dict):
                raise ConfigError(f"override {here}: {'.'.join(keys[:depth])} is {node!r} and holds no keys")
            if depth == len(keys) - 1:
                node[key] = parse_yaml(value, where=f"override {path}") if value else None  # type: ignore[index]
            elif isinstance(node, dict):
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
            else:
                node = node[key]  # type: ignore[index]
    return data


def to_plain(value: Any) -> Any:
    """A config as JSON-ready plain data."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return json.loads(json.dumps(value))


def field_sentences(model: type[BaseModel]) -> dict[str, str]:
    """Field → the sentence written under it in the source, inherited fields included; read when asked for, since pydantic's own
    ``use_attribute_docstrings`` makes every import slower."""
    found: dict[str, str] = {}
    for kind in reversed([kind for kind in model.__mro__ if issubclass(kind, BaseModel) and kind is not BaseModel]):
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found


def nested_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and every model that its fields hold, each once, outermost first."""
    waiting, seen = [model], {model}
    while waiting:
        current = waiting.pop(0)
        yield current
        for field in current.model_fields.values():
            below = _model_in(field.annotation)
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def described_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema with each key's sentence as its ``description``, which editors show."""
    schema = model.model_json_schema()
    for kind in nested_models(model):
        properties = (schema if kind is model else schema["$defs"][kind.__name__])["properties"]
        for name, sentence in field_sentences(kind).items():
            if name in properties:
                properties[name]["description"] = sentence
    return schema
