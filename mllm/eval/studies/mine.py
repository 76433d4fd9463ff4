"""Which pictures does one encoder take for alike that another tells apart: the data on which a second encoder can help at all?"""

from __future__ import annotations

import csv
import hashlib
import html
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm.config import read_yaml
from mllm.errors import ConfigError, DataError
from mllm.eval.data.pictures import Picture
from mllm.eval.predictions import write_atomic
from mllm.eval.progress import Progress
from mllm.eval.studies.study import Study, Table, number, save_study

if TYPE_CHECKING:
    from mllm.encoders.base import VisionEncoder

ALIKE, UNLIKE = 0.95, 0.6
"""MMVP's bounds (arXiv 2401.06209): cosine above 0.95 for the one encoder, below 0.6 for the other."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_BLOCK = 1024


@dataclass(frozen=True)
class Pair:
    """Two pictures by place, with each encoder's cosine similarity. blind: the encoder that takes them for alike."""

    first: int
    second: int
    similarity: Mapping[str, float]
    blind: str


def picture_files(folder: str | Path) -> list[Path]:
    """Pictures below a folder, by name. Raises `ConfigError` when there are fewer than two."""
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"{place}: no such folder; expected one with pictures")
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if len(found) < 2:
        raise ConfigError(f"{place}: {len(found)} pictures ({', '.join(sorted(_SUFFIXES))}); pairs need two")
    return found


def open_encoders(names: Sequence[str], *, device: str | None = None, least: int = 2) -> dict[str, Any]:
    """Encoders by name: of `mllm list encoders`, a YAML file with an encoder's config, or all of a checkpoint folder. Weights are
    loaded where the config names some. Raises `ConfigError` when they are not at least ``least``."""
    import torch

    from mllm.encoders.catalogue import build_encoder, encoder_config

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {}
    for name in names:
        if (Path(name) / "config.json").is_file():
            from mllm.eval.checkpoint import load_model

            model, _ = load_model(name, device=device)
            bank = next(
                (part for part in model.modules() if hasattr(part, "encoders") and hasattr(part, "infos")), None
            )
            if bank is None:
                raise ConfigError(f"{name}: no named encoders in it; give a checkpoint of this toolkit")
            found |= dict(bank.encoders.items())
            continue
        file = Path(name).suffix in (".yaml", ".yml")
        config = encoder_config(read_yaml(Path(name)) if file else name, where=name)
        encoder = build_encoder(config)
        if config.weights is not None:
            encoder.load_pretrained()
        found[Path(name).stem if file else name] = encoder
    if len(found) < least:
        needed = "a disagreement needs two" if least > 1 else "name at least one"
        raise ConfigError(f"encoders {', '.join(found) or 'none'}: {needed}; see `mllm list encoders`")
    return {name: encoder.to(place).eval() for name, encoder in found.items()}


def picture_features(
    name: str, encoder: VisionEncoder, files: Sequence[Path], *, batch_size: int = 16, progress: bool = True
) -> np.ndarray:
    """``(n, D)`` float32 features of length 1: the class token where the encoder has one, else the mean of its patches. Raises
    `DataError` for a picture that does not decode."""
    import torch

    info = encoder.describe(encoder.config)
    where = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
    parts = []
    with Progress(name, len(files), shown=progress) as bar, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            chosen = files[start : start + batch_size]
            pixels = torch.stack([Picture(path, str(path)).pixels(info.image) for path in chosen]).to(where)
            features = encoder(pixels)
            pooled = (
                features.prefix[:, 0]
                if features.prefix is not None and features.prefix.shape[1]
                else features.tokens.mean(1)
            )
            parts.append(torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy())
            for _ in chosen:
                bar.advance()
    return np.concatenate(parts)


def mine_pairs(
    features: Mapping[str, np.ndarray], *, alike: float = ALIKE, unlike: float = UNLIKE, most: int = 500
) -> list[Pair]:
    """Pairs that one encoder takes for alike (cosine at least ``alike``) and another tells apart (at most ``unlike``), the widest
    difference first, each picture in one pair. Memory grows with a block of rows, not with all pairs."""
    names = list(features)
    number_of = len(next(iter(features.values())))
    found: list[tuple[float, int, int, str]] = []
    for start in range(0, number_of, _BLOCK):
        rows = slice(start, start + _BLOCK)
        cosines = {name: features[name][rows] @ features[name].T for name in names}
        later = np.arange(number_of)[None, :] > np.arange(start, start + len(cosines[names[0]]))[:, None]
        for blind in names:
            for other in names:
                if other == blind:
                    continue
                hits = np.argwhere(later & (cosines[blind] >= alike) & (cosines[other] <= unlike))
                gaps = [
                    (float(cosines[blind][r, c] - cosines[other][r, c]), start + int(r), int(c), blind) for r, c in hits
                ]
                found = sorted([*found, *gaps], key=lambda entry: (-entry[0], entry[1:]))[: 20 * most]
    pairs, used = [], set()
    for _, first, second, blind in found:
        if first in used or second in used or len(pairs) >= most:
            continue
        used |= {first, second}
        cosine = {name: float(features[name][first] @ features[name][second]) for name in names}
        pairs.append(Pair(first, second, cosine, blind))
    return pairs


def mmvp_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """The pairs of an MMVP folder: ``MMVP Images/1.jpg`` and ``2.jpg``, ``3.jpg`` and ``4.jpg`` … Raises `ConfigError`."""
    place = Path(folder) / "MMVP Images"
    numbered = {int(path.stem): path for path in place.glob("*.jpg") if path.stem.isdigit()}
    pairs = [(numbered[k], numbered[k + 1]) for k in sorted(numbered) if k % 2 and k + 1 in numbered]
    if not pairs:
        raise ConfigError(f"{place}: no pictures 1.jpg, 2.jpg …; --mmvp wants the folder of MMVP's files")
    return pairs


def run_mine(
    encoders: Sequence[str],
    folder: str | Path,
    *,
    pictures: str | Path | None = None,
    mmvp: str | Path | None = None,
    alike: float = ALIKE,
    unlike: float = UNLIKE,
    most: int = 500,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = True,
    opened: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Mine pairs from ``pictures``, or measure the encoders on MMVP's own pairs (``mmvp``).

    Mining writes ``pairs.jsonl``, ``pairs.html`` to look at, and pictures with ``Questions.csv`` in MMVP's form: filled in, it
    is asked with ``--data mmvp=<folder>``. Features are kept in ``<folder>/features``. opened: encoders that are loaded
    already. Raises `ConfigError` when neither or both places are given.
    """
    if (pictures is None) == (mmvp is None):
        raise ConfigError("give a folder of pictures to mine, or --mmvp FOLDER to measure the encoders on its pairs")
    given = mmvp_pairs(mmvp) if mmvp is not None else []
    files = picture_files(pictures) if pictures is not None else [path for pair in given for path in pair]
    loaded = dict(opened) if opened is not None else open_encoders(encoders, device=device)
    place = Path(folder)
    features = {
        name: _kept(place / "features", name, encoder, files, batch_size, progress) for name, encoder in loaded.items()
    }
    if mmvp is not None:
        study = _probe(features, alike, unlike)
    else:
        pairs = mine_pairs(features, alike=alike, unlike=unlike, most=most)
        study = _mined(features, pairs, files, alike, unlike)
        _write_pairs(place, pairs, files)
        say(
            f"{len(pairs)} pairs: {place / 'pairs.html'} to look at, {place / 'Questions.csv'} to write a question for each"
        )
    save_study(study, place)
    return study


def _kept(
    place: Path, name: str, encoder: VisionEncoder, files: Sequence[Path], batch_size: int, progress: bool
) -> np.ndarray:
    """Features from the folder where they are of these very files, weights and encoder; else worked out and kept."""
    digest = hashlib.sha256(
        json.dumps([str(encoder.config), [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]]).encode()
    )
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}{float(tensor.float().sum()) if tensor.numel() else 0:.6e}".encode())
    target = place / f"{''.join(c if c.isalnum() else '-' for c in name)}-{digest.hexdigest()[:16]}.npy"
    if target.is_file():
        return np.load(target)
    found = picture_features(name, encoder, files, batch_size=batch_size, progress=progress)
    place.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part.npy")
    np.save(part, found)
    part.replace(target)
    return found


def _mined(
    features: Mapping[str, np.ndarray], pairs: Sequence[Pair], files: Sequence[Path], alike: float, unlike: float
) -> Study:
    counts = [
        (
            name,
            str(sum(pair.blind == name for pair in pairs)),
            str(sum(pair.similarity[name] <= unlike for pair in pairs)),
        )
        for name in features
    ]
    shown = [
        (
            files[pair.first].name,
            files[pair.second].name,
            pair.blind,
            *(number(pair.similarity[name], 3) for name in features),
        )
        for pair in pairs
    ]
    tables = [
        Table(
            "Pairs of which an encoder is blind, and which it tells apart", ("encoder", "blind", "tells apart"), counts
        ),
        Table("Pairs", ("first", "second", "blind", *features), shown, 3),
    ]
    notes = [
        f"{len(pairs)} pairs among {len(files)} pictures: cosine at least {alike:g} for one encoder, at most {unlike:g} for another.",
        "Only on such pictures can the other encoder help; a question about each pair shows whether it does (MMVP).",
    ]
    if not pairs:
        notes.append(
            "No pair: the encoders agree on these pictures, or the bounds are too far apart (--alike, --unlike)."
        )
    data = {
        "pairs": [
            {"first": str(files[p.first]), "second": str(files[p.second]), "blind": p.blind, **p.similarity}
            for p in pairs
        ]
    }
    return Study("mine", "Pictures on which encoders disagree", notes, tables, data)


def _probe(features: Mapping[str, np.ndarray], alike: float, unlike: float) -> Study:
    rows, data = [], {}
    for name, values in features.items():
        cosine = np.sum(values[0::2] * values[1::2], axis=1)
        shares = float((cosine >= alike).mean()), float((cosine <= unlike).mean())
        data[name] = {"mean": float(cosine.mean()), "blind": shares[0], "apart": shares[1], "cosine": cosine.tolist()}
        rows.append(
            (
                name,
                number(float(cosine.mean()), 3),
                number(100 * shares[0], 1),
                number(100 * shares[1], 1),
                str(len(cosine)),
            )
        )
    headings = ("encoder", "mean cosine", f"blind % (≥ {alike:g})", f"told apart % (≤ {unlike:g})", "pairs")
    notes = ["No language model and no text takes part: only whether an encoder's features of the two pictures differ."]
    return Study("mine", "Encoders on MMVP's pairs", notes, [Table("Encoders on MMVP's pairs", headings, rows)], data)


def _write_pairs(place: Path, pairs: Sequence[Pair], files: Sequence[Path]) -> None:
    lines = [
        {
            "first": str(files[p.first]),
            "second": str(files[p.second]),
            "blind": p.blind,
            "similarity": dict(p.similarity),
        }
        for p in pairs
    ]
    write_atomic(place / "pairs.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    sheet = place / "Questions.csv"
    if not sheet.exists():  # it may hold questions by hand
        copies = place / "MMVP Images"
        copies.mkdir(parents=True, exist_ok=True)
        with sheet.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["Index", "Question", "Options", "Correct Answer", "File"])
            for position, pair in enumerate(pairs):
                for number_of, which, answer in (
                    (2 * position + 1, pair.first, "(a)"),
                    (2 * position + 2, pair.second, "(b)"),
                ):
                    shutil.copyfile(files[which], copies / f"{number_of}.jpg")
                    writer.writerow([number_of, "", "(a)  (b) ", answer, files[which]])
    cells = "".join(
        f"<figure><img src='{_uri(files[p.first])}'><img src='{_uri(files[p.second])}'><figcaption>{k}: {html.escape(p.blind)} is blind · "
        + " · ".join(f"{html.escape(name)} {value:.3f}" for name, value in p.similarity.items())
        + "</figcaption></figure>"
        for k, p in enumerate(pairs, 1)
    )
    style = "body{font:14px system-ui;margin:2em;color-scheme:light dark}img{width:22em;max-width:45vw;margin:.2em}figure{margin:1em 0}"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Pairs</title><style>{style}</style>"
        f"<h1>{len(pairs)} pairs</h1>{cells}</html>\n"
    )
    write_atomic(place / "pairs.html", page)


def _uri(path: Path) -> str:
    try:
        return path.resolve().as_uri()
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
