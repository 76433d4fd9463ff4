"""Which encoders are good for these pictures, and which of them see the same: probes on frozen features, before anything is trained."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm.errors import CheckpointError, ConfigError, DataError, UnavailableError, did_you_mean
from mllm.eval.data.pictures import Picture
from mllm.eval.predictions import write_atomic
from mllm.eval.progress import Progress
from mllm.eval.studies.study import Study, Table, number, save_study, study_html

if TYPE_CHECKING:
    from mllm.encoders.base import VisionEncoder

SAME = 0.9
"""Linear CKA from which two encoders are told to see the same."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_LABELS = ("label", "answer")
_NEIGHBOURS = 10
_STYLE = (
    "body{font:15px system-ui;max-width:75em;margin:2em auto;color-scheme:light dark}"
    "td,th{padding:.2em .7em;text-align:left}.n{text-align:right}"
)


@dataclass(frozen=True)
class Labelled:
    """Pictures with the class of each."""

    files: list[Path]
    labels: list[str]
    source: str


@dataclass
class Probed:
    """What one encoder's frozen features are worth here. Accuracies are shares of the held-out pictures."""

    name: str
    weights: str
    tokens: int
    width: int
    millions: float
    gflops: float
    milliseconds: float
    features: np.ndarray
    linear: float = math.nan
    neighbours: float = math.nan
    rank: float = math.nan


def labelled_pictures(
    data: str | Path, *, label: str | None = None, where: Mapping[str, str] | None = None, limit: int | None = None
) -> Labelled:
    """Pictures of a folder with one subfolder a class, or of a ``.jsonl`` file whose rows name an ``image`` (beside the file) and a
    class under ``label`` (default: ``label`` or ``answer``). where: only rows with these values. Every class has two pictures or
    more, at most ``limit`` pictures are taken, evenly over the classes. Raises `ConfigError` or `DataError` saying what is missing."""
    place = Path(data)
    pairs = _of_folder(place) if place.is_dir() else _of_rows(place, label, where or {})
    if place.is_dir() and (label or where):
        raise ConfigError(f"{place}: a folder's classes are its subfolders; --label and --where are for .jsonl files")
    counts = Counter(name for _, name in pairs)
    pairs = [(file, name) for file, name in pairs if counts[name] > 1]
    if len({name for _, name in pairs}) < 2:
        raise DataError(
            f"{place}: a probe needs two classes of two pictures or more; found {dict(counts.most_common(5)) or 'none'}"
        )
    if limit is not None and limit < len(pairs):
        pairs = _evenly(pairs, limit)
    missing = next((file for file, _ in pairs if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{place}: picture {missing} does not exist")
    return Labelled([file for file, _ in pairs], [name for _, name in pairs], str(data))


def _of_folder(place: Path) -> list[tuple[Path, str]]:
    found = [
        (file, folder.name)
        for folder in sorted(place.iterdir())
        if folder.is_dir()
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise DataError(f"{place}: no pictures in subfolders; expected one subfolder a class, or a .jsonl file")
    return found


def _of_rows(place: Path, label: str | None, where: Mapping[str, str]) -> list[tuple[Path, str]]:
    if place.suffix != ".jsonl" or not place.is_file():
        raise ConfigError(
            f"{place}: expected a folder with one subfolder a class, or a .jsonl file with image and label"
        )
    found = []
    for number_of, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}:{number_of}: no JSON ({error})") from None
        keys = [label] if label else [key for key in _LABELS if key in row]
        absent = [key for key in ("image", *(keys or _LABELS[:1]), *where) if key not in row]
        if absent:
            near = did_you_mean(absent[0], row)
            raise DataError(f"{place}:{number_of}: no {absent[0]!r} in the row{near} It has {', '.join(row)}")
        if all(str(row[key]) == value for key, value in where.items()):
            found.append((place.parent / row["image"], str(row[keys[0]])))
    return found


def _evenly(pairs: list[tuple[Path, str]], limit: int) -> list[tuple[Path, str]]:
    """The first pictures of every class in turns, in the order they came in."""
    seen: Counter[str] = Counter()
    ranked = []
    for place, (_, name) in enumerate(pairs):
        ranked.append((seen[name], place))
        seen[name] += 1
    return [pairs[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


def open_encoder(name: str, *, random: bool, device: Any) -> tuple[Any, str]:
    """An encoder of `mllm list encoders` or of a YAML file, and a word on its weights. random: they are drawn, whatever the entry
    names."""
    import torch

    from mllm.config import read_yaml
    from mllm.encoders import ENCODERS
    from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config

    file = Path(name).suffix in (".yaml", ".yml")
    spec: Any = read_yaml(Path(name)) if file else name
    if not file and name in ENCODERS and name not in catalogue():
        spec = {"type": name}  # of a plug-in, with its own defaults
    config = encoder_config(spec, where=name)
    torch.manual_seed(0)
    encoder = build_encoder(config)
    if random or config.weights is None:
        return encoder.to(device).eval(), "random"
    encoder.load_pretrained()
    return encoder.to(device).eval(), config.weights.source


def features_of(
    name: str, encoder: VisionEncoder, weights: str, files: Sequence[Path], *, batch_size: int, progress: bool
) -> Probed:
    """Mean and largest value of every channel over the patches of each picture, with the encoder's cost. Time is of the encoder
    alone, without the first batch."""
    import torch

    info = encoder.describe(encoder.config)
    device = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
    parts, spent, timed = [], 0.0, 0
    with Progress(name, len(files), shown=progress) as bar, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            chosen = files[start : start + batch_size]
            pixels = torch.stack([Picture(path, str(path)).pixels(info.image) for path in chosen]).to(device)
            began = time.perf_counter()
            tokens = encoder(pixels).tokens.float()
            pooled = torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1).cpu()
            if start or len(files) <= batch_size:
                spent, timed = spent + time.perf_counter() - began, timed + len(chosen)
            parts.append(pooled.numpy())
            for _ in chosen:
                bar.advance()
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise DataError(f"encoder {name}: its features are not finite")
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    return Probed(
        name, weights, info.num_tokens, info.width, millions, cost_of(encoder), 1e3 * spent / max(timed, 1), features
    )


def cost_of(encoder: VisionEncoder) -> float:
    """GFLOPs of one picture: what the encoder tells of its last call, else counted without computing; NaN where that fails."""
    import torch

    from mllm.encoders.catalogue import build_encoder
    from mllm.encoders.costs import gflops

    last_cost = getattr(encoder, "last_cost", dict)().get("gflops")
    if last_cost is not None:
        return float(last_cost)
    image = encoder.describe(encoder.config).image
    try:
        with torch.device("meta"):
            twin = build_encoder(encoder.config).eval().requires_grad_(False)
        return gflops(lambda pixels: twin(pixels).tokens, (1, image.channels, image.height, image.width))
    except (RuntimeError, NotImplementedError):  # an operation without shapes of its own
        return math.nan


def judge(probed: Probed, labels: Sequence[str], split: tuple[np.ndarray, np.ndarray]) -> None:
    """Fill in the probes' accuracies on the held-out pictures and the effective rank of all features."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer, StandardScaler
    except ImportError as error:
        raise UnavailableError("probes need scikit-learn: pip install 'mllm-toolkit[eval]'") from error
    train, test = split
    names = np.asarray(labels)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    count = min(_NEIGHBOURS, len(train))
    nearest = make_pipeline(Normalizer(), KNeighborsClassifier(count, weights="distance"))
    x = probed.features
    probed.linear = float(linear.fit(x[train], names[train]).score(x[test], names[test]))
    probed.neighbours = float(nearest.fit(x[train], names[train]).score(x[test], names[test]))
    probed.rank = effective_rank(x)


def halves(labels: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Places to learn from and to judge by: two thirds and one third of every class, at least one of each."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    names = np.asarray(labels)
    for name in dict.fromkeys(labels):
        places = rng.permutation(np.flatnonzero(names == name))
        held = max(1, len(places) // 3)
        test += places[:held].tolist()
        train += places[held:].tolist()
    return np.sort(np.array(train)), np.sort(np.array(test))


def effective_rank(features: np.ndarray) -> float:
    """e to the entropy of the centred features' normalised singular values (Roy & Vetterli 2007): how many directions are used."""
    values = np.linalg.svd(features - features.mean(0), compute_uv=False).astype(np.float64)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centred kernel alignment of two encoders' features ``(n, D)``, ``(n, D')`` of the same pictures, from 0 to 1."""
    grams = []
    for x in (first, second):
        centred = (x - x.mean(0)).astype(np.float64)
        grams.append(centred @ centred.T)
    norms = [float(np.linalg.norm(gram)) for gram in grams]
    return float((grams[0] * grams[1]).sum() / (norms[0] * norms[1])) if all(norms) else math.nan


def run_probe(
    encoders: Sequence[str],
    data: Labelled,
    folder: str | Path,
    *,
    random: bool = False,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Probe every encoder on the same pictures; writes ``probe.json``, ``probe.md`` and ``probe.html``. One encoder is in memory at a
    time. Raises `ConfigError` for an empty list; an encoder whose weights cannot be had is named and left out, unless none is left."""
    import torch

    if not encoders:
        raise ConfigError("--encoders: name at least one of `mllm list encoders`, or a YAML file")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    split = halves(data.labels)
    found: list[Probed] = []
    left_out: dict[str, str] = {}
    for name in encoders:
        try:
            encoder, weights = open_encoder(name, random=random, device=place)
        except (UnavailableError, CheckpointError) as error:
            left_out[name] = str(error)
            say(f"{name}: left out ({error})")
            continue
        probed = features_of(name, encoder, weights, data.files, batch_size=batch_size, progress=progress)
        judge(probed, data.labels, split)
        found.append(probed)
    if not found:
        raise UnavailableError(
            f"no encoder could be opened: {next(iter(left_out.values()))}; --random probes untrained ones"
        )
    study = probe_study(found, data, split, place, left_out)
    save_study(study, folder)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{study.title}</title><style>{_STYLE}</style>"
    page = f"{head}{study_html(study)}</html>\n"
    write_atomic(Path(folder) / "probe.html", page)
    return study


def probe_study(
    found: Sequence[Probed],
    data: Labelled,
    split: tuple[np.ndarray, np.ndarray],
    device: Any,
    left_out: Mapping[str, str],
) -> Study:
    """Tables of probes (best first) and of likeness, and notes on what they mean."""
    held, classes = len(split[1]), Counter(data.labels)
    alike = {(a.name, b.name): cka(a.features, b.features) for k, a in enumerate(found) for b in found[k + 1 :]}
    chance = max(Counter(np.asarray(data.labels)[split[1]].tolist()).values()) / held
    error = 100 * math.sqrt(0.25 / held)
    ordered = sorted(found, key=lambda p: -p.linear)
    rows = [
        (
            p.name, p.weights, number(100 * p.linear, 1), number(100 * p.neighbours, 1), number(p.rank, 1), number(p.millions, 1),
            number(p.gflops, 1), number(p.milliseconds, 1), str(p.tokens), str(p.width),
        )
        for p in ordered
    ]  # fmt: skip
    headings = (
        "encoder", "weights", "linear %", "kNN %", "eff. rank", "M", "GFLOPs", f"ms/picture ({device})", "tokens", "width",
    )  # fmt: skip
    tables = [Table("Probes on frozen features", headings, rows, 2)]
    pairs = sorted(alike.items(), key=lambda item: -item[1])
    if pairs:
        shown = [(a, b, number(value, 3), "the same" if value >= SAME else "") for (a, b), value in pairs]
        tables.append(
            Table("How alike two encoders see (linear CKA)", ("encoder", "other", "CKA", "verdict"), shown, 2)
        )
    notes = [
        f"{len(data.files)} pictures of {data.source}, {len(classes)} classes; {held} held out. The commonest class alone: "
        f"{100 * chance:.1f} %. Standard error of an accuracy: at most {error:.1f} points.",
        "Features: mean and largest value of every channel over the patches. Linear: logistic regression on standardised features; kNN: "
        f"{_NEIGHBOURS} neighbours by cosine. Effective rank: e to the entropy of the singular values.",
        "Encoders that are good and unlike (low CKA) complement one another; a pair that sees the same costs twice.",
    ]
    if any(p.weights == "random" for p in found):
        notes.append(
            "Weights told as random were never trained: such a row says what the architecture alone is worth, not the encoder."
        )
    notes += [f"Left out: {name}: {reason}" for name, reason in left_out.items()]
    kept = [{key: value for key, value in vars(p).items() if key != "features"} for p in ordered]
    data_of = {"encoders": kept, "cka": [{"first": a, "second": b, "cka": v} for (a, b), v in pairs], "chance": chance}
    return Study("probe", "What encoders see in these pictures", notes, tables, data_of)
