"""What does a checkpoint's page on the hub say, and how does it get there?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.checkpoint_code import KEY
from mllm.damage import LEFT_OUT, damage_in, read_json
from mllm.door import SOURCES
from mllm.errors import ConfigError, UnavailableError
from mllm.hub import hub_reason
from mllm.models.model_index import model_index
from mllm.parts.get import PREFIX
from mllm.processing.frames import video_spec

_MARK = "<!-- written by mllm push -->"
_CARD = "README.md"
_NOT_SENT = ["*.pyc", ".*"]


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    scores: str | Path | None = None,
    private: bool = False,
    message: str = "Upload a checkpoint",
) -> str:
    """Send a checkpoint folder with its model card to ``owner/name`` on the hub; returns the commit's address.

    scores: folder of an evaluation (``results.json``; of `mllm eval budgets` ``budgets.json``); default: ``eval`` beside the
    checkpoint, where there is one. A README.md that was not written here is kept as it is. Raises `ConfigError` for a folder that
    holds no checkpoint, `UnavailableError` with the reason when the hub refuses.
    """
    folder = Path(checkpoint)
    _check(folder, repository)
    from huggingface_hub import HfApi

    card = _card_to_write(folder, repository, scores)
    if card is not None:
        (folder / _CARD).write_text(card, encoding="utf-8")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        sent = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=_NOT_SENT
        )
    except Exception as error:  # the hub's client and what lies under it raise many kinds
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            reason = "the hub does not know you, or you may not write there; `hf auth login`, or set HF_TOKEN to a token that may write"
        else:
            reason = hub_reason(error, repository)
        raise UnavailableError(f"{repository}: not pushed: {reason}") from error
    return str(sent.commit_url)


@dataclass(frozen=True)
class Upload:
    """What `push` would send. files: name in the repository and bytes; writes_card: whether README.md is written first, its size that of
    the card; licences: (part, source, licence, commercial use)."""

    files: list[tuple[str, int]]
    writes_card: bool
    licences: list[tuple[str, str, str, str]]


def planned(checkpoint: str | Path, repository: str, *, scores: str | Path | None = None) -> Upload:
    """What `push` would send with the same arguments, and what it would be refused for here; nothing is written and no server asked.

    Raises `ConfigError` as `push` does.
    """
    folder = Path(checkpoint)
    _check(folder, repository)
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    card = _card_to_write(folder, repository, scores)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if card is not None:
        sizes[_CARD] = len(card.encode())
    kept = sorted(filter_repo_objects(sizes, ignore_patterns=[*_NOT_SENT, *DEFAULT_IGNORE_PATTERNS]))
    return Upload([(name, sizes[name]) for name in kept], card is not None, _parts(*_config_and_recipe(folder)))


def _check(folder: Path, repository: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no checkpoint (config.json is missing)")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"{repository!r}: expected owner/name")
    if problem := damage_in(folder):
        raise ConfigError(f"{problem}; nothing was sent")


def _card_to_write(folder: Path, repository: str, scores: str | Path | None) -> str | None:
    """The card; None where the folder has a README.md that was not written here."""
    there = folder / _CARD
    if there.is_file() and _MARK not in there.read_text(encoding="utf-8"):
        return None
    return model_card(folder, repository, scores=scores)


def _config_and_recipe(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe = folder / "recipe.yaml"
    told = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    return read_json(folder / "config.json"), told


def model_card(folder: Path, repository: str, *, scores: str | Path | None = None) -> str:
    """The card: parts with their licences, how to open it, the recipe, and scores with the rules that gave them."""
    config, recipe = _config_and_recipe(folder)
    parts = _parts(config, recipe)
    place = Path(scores) if scores is not None else folder.parent / "eval"
    if scores is not None and not (place / "results.json").is_file():
        raise ConfigError(f"--scores {place}: no results.json; `mllm eval run` writes it")
    sections = [
        "---\n"
        + yaml.safe_dump(
            _metadata(parts, video=bool(config.get("video"))) | _index(place / "results.json", repository),
            sort_keys=False,
            allow_unicode=True,
        )
        + "---",
        _MARK,
        f"# {repository.split('/')[1]}\n\n{recipe.get('description') or 'A multimodal language model.'}",
        "## Parts\n\n" + _table(("part", "from", "licence", "commercial use"), parts),
        _opening(repository, config, brings_code=(folder / SOURCES).is_file()),
        _joining(repository, read_json(folder / LEFT_OUT)) if (folder / LEFT_OUT).is_file() else "",
        _scores(place / "results.json"),
        _budgets(place / "budgets.json"),
        _training(recipe),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _parts(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    words = {True: "yes", False: "no", None: "not known"}
    text = (recipe.get("model") or {}).get("language_model") or {}
    kind = (config.get("text_config") or {}).get("model_type", "?")
    rows = [
        (
            "language model",
            text.get("source") or f"{kind}, from scratch",
            text.get("licence") or "unknown",
            words[text.get("commercial")],
        )
    ]
    for name, encoder in (config.get("encoders") or {}).items():
        weights = encoder.get("weights") or {}
        source = weights.get("source") or f"{encoder.get('type')}, from scratch"
        rows.append((f"encoder {name}", source, weights.get("licence") or "unknown", words[weights.get("commercial")]))
    for part in ("connector", "router", "visual_tokenizer"):
        if config.get(part):
            rows.append(
                (
                    part.replace("_", " "),
                    str(config[part].get("type", config[part].get("encoder"))),
                    "this toolkit's",
                    "yes",
                )
            )
    rows += [
        (f"head {name}", head["type"], "this toolkit's", "yes") for name, head in (config.get("heads") or {}).items()
    ]
    return rows


def _metadata(parts: list[tuple[str, str, str, str]], *, video: bool) -> dict[str, Any]:
    """The card's head: the hub finds models by it. Several licences are ``other``, since all of them bind."""
    licences = sorted({licence.lower() for part, _, licence, _ in parts if part.startswith(("language", "encoder"))})
    licence = (
        {"license": licences[0]}
        if len(licences) == 1 and licences[0] != "unknown"
        else {"license": "other", "license_name": "see-parts"}
    )
    sources = sorted({source for _, source, _, _ in parts if source.count("/") == 1 and " " not in source})
    base = {"base_model": sources} if sources else {}
    return {
        "library_name": "mllm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mllm", "multimodal", *(["video-text-to-text"] if video else [])],
        **licence,
        **base,
    }


def _index(path: Path, repository: str) -> dict[str, Any]:
    """The scores as the hub reads them."""
    if not path.is_file():
        return {}
    found = model_index(json.loads(path.read_text(encoding="utf-8")), repository.split("/")[1])
    return {"model-index": found} if found else {}


def _is_here_alone(source: str) -> bool:
    """Whether weights come from a file or folder of this machine, which nobody else has by that name."""
    return not source.startswith(PREFIX) and (Path(source).is_absolute() or Path(source).expanduser().exists())


def _joining(repository: str, left_out: Mapping[str, Any]) -> str:
    entries = {"language model": left_out["language_model"]}
    entries |= {f"encoder {name}": entry for name, entry in left_out["encoders"].items()}
    rows = [
        (part, f"`{entry['source']}`", entry["revision"] or "-", f"{len(entry['tensors'])}")
        for part, entry in entries.items()
    ]
    table = _table(("part", "from", "revision", "tensors"), rows)
    local = [f"`{entry['source']}` ({part})" for part, entry in entries.items() if _is_here_alone(entry["source"])]
    if local:
        table += (
            f"\n\n{', '.join(local)}: a place on the machine that wrote this. Elsewhere, put the same weights there, or write where "
            "they are (a hub id, `package:NAME`, a path) as `source` into `left_out.json`; they are checked by their sha256."
        )
    return (
        "## What is not in it\n\nThese are the trained parts alone. Published weights were left out: opening it fetches them, checks "
        f"the sha256 of every tensor and gives the same model to the bit.\n\n{table}\n\nA server (vLLM) needs the whole checkpoint:\n\n"
        f"```bash\nmllm export {repository} whole\n```"
    )


def _films(config: Mapping[str, Any]) -> str:
    """How a model that takes video is given one, and which frames it sees."""
    video = video_spec(config.get("video"))
    if video is None:
        return ""
    told = ", ".join(f"`{key}: {value}`" for key, value in video.model_dump(exclude_defaults=True).items())
    return (
        f"\n\nIt takes videos and scenes of several pictures, and sees of a video ({told}) what its own config says:\n\n```python\n"
        'inputs = processor(text="<video>\\nWhat happens?", videos="clip.mp4", return_tensors="pt")\n```'
    )


def _opening(repository: str, config: Mapping[str, Any], *, brings_code: bool) -> str:
    files = [entry.get("file") or entry.get("module") for entry in config.get(KEY) or ()]
    trust = ", trust_remote_code=True" if brings_code else ""
    first = "" if brings_code else "import mllm  # pip install mllm-toolkit; makes the classes known to transformers\n"
    code = (
        f"{first}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("{repository}"{trust})\n'
        f'processor = AutoProcessor.from_pretrained("{repository}"{trust})'
    )
    plugins = ", ".join(f"`{name}`" for name in files)
    sentence = (
        f"\n\nParts of it are defined in {plugins}, code of its authors: read it, then open it with `--plugin`."
        if files and not brings_code
        else ""
    )
    return f"## Opening it\n\n```python\n{code}\n```{sentence}{_films(config)}"


def _scores(path: Path) -> str:
    """Every score beside its interval and the most that the same questions give without the right picture."""
    if not path.is_file():
        return ""
    rows = []
    for name, task in json.loads(path.read_text(encoding="utf-8"))["tasks"].items():
        for metric in task["metrics"]:
            value = "-" if metric["value"] is None else f"{metric['value']:.2f}"
            limited = " (a part of it)" if task["header"].get("limited") else ""
            ends = [metric.get("low"), metric.get("high")]
            interval = "-" if None in ends else f"{ends[0]:.1f} to {ends[1]:.1f}"
            floor, rule = _without_picture(task, metric["label"]), (metric["label"], metric.get("protocol", ""))
            rows.append((f"{name}{limited}", value, interval, floor, str(task["num_samples"]), *rule))
    head = ("task", "score", "95 %", "without the right picture", "samples", "rule", "whose rule")
    return "## Scores\n\n" + _table(head, rows)


def _without_picture(task: Mapping[str, Any], label: str) -> str:
    """The highest of what was measured without the right picture, by name; it says which were not."""
    ways = {"blank": task.get("blind"), "shuffled": task.get("shuffled"), "prior": task.get("prior")}
    found = {
        name: metric["value"]
        for name, way in ways.items()
        for metric in (way or {}).get("metrics", ())
        if metric["label"] == label and metric["value"] is not None
    }
    if not found:
        return "not measured"
    most = max(found, key=lambda name: found[name])
    missing = [name for name in ways if name not in found]
    return f"{found[most]:.2f} ({most}{''.join(f', {name} not measured' for name in missing)})"


def _budgets(path: Path) -> str:
    """What `mllm eval budgets` found: score against visual tokens."""
    if not path.is_file():
        return ""
    study = read_json(path)

    def said(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [
        (
            found["task"],
            found["budget"],
            said(found["tokens"], 1),
            said(found["score"]),
            f"{said(found['low'])} to {said(found['high'])}",
            found["num_samples"],
            found["rule"],
        )
        for found in study["data"]["budgets"]
    ]
    head = ("task", "most tokens a picture", "tokens a question", "score", "95 %", "samples", "rule")
    return f"## Score against visual tokens\n\n{study['notes'][0]}\n\n" + _table(head, rows)


def _training(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    stages = [
        (
            s["name"],
            s.get("kind", "sft"),
            ", ".join(_learned(s["learn"])),
            str(s.get("steps") or f"{s.get('epochs')} epochs"),
        )
        for s in recipe.get("stages", [])
    ]
    source = f"\n\nHyper-parameters from: {recipe['source']}" if recipe.get("source") else ""
    table = _table(("stage", "kind", "learns", "steps"), stages)
    return f"## Training\n\n{table}{source}\n\nThe whole recipe: `recipe.yaml`; what ran: `run.json`."


def _learned(learn: Mapping[str, Any]) -> list[str]:
    """The parts that learn, those by adapters named so."""
    return [f"{part} (LoRA)" if isinstance(how, Mapping) and how.get("lora") else part for part, how in learn.items()]


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)
