"""How far do changes of a picture that nobody sees move an encoder's features, and does what fools one encoder fool another?

After dSVA's question (arXiv 2506.21046): do encoders of different learning, contrastive and masked, fall to one change? Their generator
is not rebuilt: here the change is found by projected gradient steps on encoders that are in this process, in memory, within a small bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mllm.config import StrictModel
from mllm.encoders.base import VisionEncoder
from mllm.errors import ConfigError
from mllm.eval.data.pictures import Picture
from mllm.eval.progress import Progress
from mllm.eval.studies.mine import open_encoders, picture_files
from mllm.eval.studies.study import Study, Table, number, save_study

_LARGEST, _MOST_STEPS = 8.0, 50
ALL, NOISE = "all at once", "noise"


class AttackSettings(StrictModel):
    """How hard the pictures are changed."""

    epsilon: float = Field(default=2.0, gt=0)
    """Largest change of a pixel, in 255ths."""
    steps: int = Field(default=5, ge=1)
    seed: int = 0
    batch_size: int = Field(default=8, ge=1)
    size: int = Field(default=224, ge=8)
    """Side of the pictures that are changed; every encoder sees them resized to its own."""


def check_settings(settings: AttackSettings) -> None:
    """Raises `ConfigError` for a change that could be seen, or more steps than a test of robustness needs."""
    if settings.epsilon > _LARGEST:
        raise ConfigError(f"epsilon: {settings.epsilon:g} of 255 can be seen; this test takes at most {_LARGEST:g}")
    if settings.steps > _MOST_STEPS:
        raise ConfigError(f"steps: {settings.steps} are more than this test takes ({_MOST_STEPS})")


def seen(encoder: VisionEncoder, pictures: Tensor) -> Tensor:
    """Tokens ``(B, N, D)`` of pictures ``(B, 3, S, S)`` in [0, 1], which stay differentiable."""
    image = encoder.describe(encoder.config).image
    resized = F.interpolate(pictures, size=(image.height, image.width), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (image.mean, image.std))
    return encoder(((resized - mean) / std).to(pictures.dtype)).tokens.float()


def likeness(tokens: Tensor, clean: Tensor) -> Tensor:
    """``(B,)``: mean cosine of a picture's tokens to what they were."""
    return F.cosine_similarity(tokens, clean, dim=-1).mean(1)


def change(
    encoders: Mapping[str, Any], pictures: Tensor, settings: AttackSettings, generator: torch.Generator
) -> Tensor:
    """Pictures within ``epsilon`` of the given ones whose tokens are as unlike as the steps find, for all ``encoders`` together."""
    bound = settings.epsilon / 255
    pace = 2.5 * bound / settings.steps
    with torch.no_grad():
        clean = {name: seen(encoder, pictures) for name, encoder in encoders.items()}
    start = torch.rand(pictures.shape, generator=generator).to(pictures) * 2 - 1
    moved = (pictures + bound * start).clamp(0, 1)
    for _ in range(settings.steps):
        moved = moved.detach().requires_grad_()
        alike = torch.stack([likeness(seen(e, moved), clean[name]).sum() for name, e in encoders.items()]).sum()
        (gradient,) = torch.autograd.grad(alike, moved)
        with torch.no_grad():
            moved = moved - pace * gradient.sign()
            moved = (pictures + (moved - pictures).clamp(-bound, bound)).clamp(0, 1)
    return moved.detach()


def run_attack(
    encoders: Sequence[str],
    folder: str | Path,
    pictures: str | Path,
    settings: AttackSettings,
    *,
    limit: int = 64,
    device: str | None = None,
    opened: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Study:
    """Attack each encoder alone, all together, and all by noise of the same size; writes ``attack.json`` and ``attack.md``. opened:
    encoders that are loaded already. Raises `ConfigError` for settings beyond a small test."""
    check_settings(settings)
    files = picture_files(pictures)[:limit]
    loaded = dict(opened) if opened is not None else open_encoders(encoders, device=device, least=1)
    for name, encoder in loaded.items():
        if encoder.describe(encoder.config).image.panels > 1:
            raise ConfigError(f"encoder {name} sees pictures of several panels; this test changes RGB pictures only")
        encoder.eval().requires_grad_(False)
    targets: dict[str, list[str]] = {name: [name] for name in loaded}
    if len(loaded) > 1:
        targets[ALL] = list(loaded)
    alike: dict[str, dict[str, list[Tensor]]] = {t: {name: [] for name in loaded} for t in (*targets, NOISE)}
    pooled: dict[str, dict[str, list[Tensor]]] = {t: {name: [] for name in loaded} for t in (*targets, NOISE, "clean")}
    generator = torch.Generator().manual_seed(settings.seed)
    place = next((p.device for e in loaded.values() for p in e.parameters()), torch.device("cpu"))
    with Progress("attack", len(files), shown=progress) as bar:
        for start in range(0, len(files), settings.batch_size):
            chosen = files[start : start + settings.batch_size]
            batch = torch.stack([_square(path, settings.size) for path in chosen]).to(place)
            changed = {
                t: change({n: loaded[n] for n in names}, batch, settings, generator) for t, names in targets.items()
            }
            sign = torch.randint(0, 2, batch.shape, generator=generator).to(batch) * 2 - 1
            changed[NOISE] = (batch + settings.epsilon / 255 * sign).clamp(0, 1)
            with torch.no_grad():
                for name, encoder in loaded.items():
                    clean = seen(encoder, batch)
                    pooled["clean"][name].append(clean.mean(1).cpu())
                    for target, moved in changed.items():
                        tokens = seen(encoder, moved)
                        alike[target][name].append(likeness(tokens, clean).cpu())
                        pooled[target][name].append(tokens.mean(1).cpu())
            for _ in chosen:
                bar.advance()
    study = _study(alike, pooled, list(loaded), len(files), settings)
    save_study(study, folder)
    return study


def _square(path: Path, size: int) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    picture, _ = Picture(path, str(path)).load()
    return pil_to_tensor(picture.resize((size, size), 3)).float() / 255


def _study(
    alike: Mapping[str, Mapping[str, list[Tensor]]],
    pooled: Mapping[str, Mapping[str, list[Tensor]]],
    names: list[str],
    count: int,
    settings: AttackSettings,
) -> Study:
    rows, data = [], {}
    for target, by_encoder in alike.items():
        data[target] = {}
        cells = []
        for name in names:
            cosine = float(torch.cat(by_encoder[name]).mean())
            moved, clean = (F.normalize(torch.cat(pooled[t][name]), dim=-1) for t in (target, "clean"))
            known = float(((moved @ clean.T).argmax(1) == torch.arange(count)).float().mean())
            data[target][name] = {"cosine": cosine, "recognised": known}
            cells += [number(cosine, 3), number(100 * known, 1)]
        rows.append((target, *cells))
    headings = ("changed for", *(cell for name in names for cell in (f"{name}: cosine", "recognised %")))
    notes = [
        f"{count} pictures, no pixel changed by more than {settings.epsilon:g}/255, {settings.steps} gradient steps in memory; {NOISE}: "
        "random signs of the same size.",
        "Cosine: of tokens to what they were. Recognised: pictures whose nearest unchanged picture is still their own.",
        "An encoder that keeps its cosine in another's row is not fooled by what fools that one: joined, the two are safer. The bound and "
        "the steps are small and the attack knows the encoder, so this is a comparison, not a certificate.",
    ]
    return Study(
        "attack",
        "Encoders under changes that nobody sees",
        notes,
        [Table("Likeness after the change", headings, rows)],
        data,
    )
