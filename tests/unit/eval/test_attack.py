"""Does the attack stay within its bound, move features further than noise does, and refuse to do more?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.encoders.backbones.biformer import BiFormerEncoder
from mllm.encoders.backbones.vssd import VssdEncoder
from mllm.errors import ConfigError
from mllm.eval.studies.attack import ALL, NOISE, AttackSettings, change, run_attack
from mllm.testing.encoders import build_example, resolve_example


def test_small_changes_move_the_attacked_encoder_further_than_noise(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(5):
        pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64), 2).save(tmp_path / f"{k}.png")
    opened = {
        "one": build_example(resolve_example({**BiFormerEncoder.tiny(), "image_size": 64})),
        "other": build_example(resolve_example(VssdEncoder.tiny()), seed=1),
    }
    with torch.no_grad():
        for encoder in opened.values():  # untrained weights hardly look at the picture
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    settings = AttackSettings(epsilon=4, steps=4, batch_size=3, size=64)
    study = run_attack([], tmp_path / "out", tmp_path, settings, opened=opened, progress=False)
    for name in opened:
        lost = {target: 1 - found[name]["cosine"] for target, found in study.data.items()}
        assert lost[name] > 1.5 * lost[NOISE] > 0 and lost[ALL] > 1.2 * lost[NOISE], lost
    assert (tmp_path / "out" / "attack.md").is_file()

    pictures = torch.rand(2, 3, 64, 64)
    moved = change(opened, pictures, settings, torch.Generator().manual_seed(0))
    assert float((moved - pictures).abs().max()) <= 4 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1


@pytest.mark.parametrize(("changes", "word"), [({"epsilon": 9}, "epsilon: 9"), ({"steps": 51}, "steps: 51")])
def test_more_than_a_small_test_is_refused(changes, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        run_attack(["clip-vit-b-32"], tmp_path, tmp_path, AttackSettings(**changes))
