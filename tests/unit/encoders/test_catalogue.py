"""Does a recipe's mention of an encoder mean what it says, and is what is wrong with it told?"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mllm.config import to_plain
from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config, licence_warnings, matching
from mllm.errors import ConfigError, UnknownName
from mllm.testing import find_check

RAW = {"type": "raw_patches", "image_size": 8, "patch_size": 4}
REQUIRED = """
    clip-vit-l-14-336 clip-vit-b-32 siglip-so400m-384 siglip2-so400m-384 siglip2-so400m-512 dinov2-l dinov2-l-reg4
    dinov2-g dinov3-l convnext-xxl-clip convnext-l-clip sam-l sam-h eva02-l-det pix2struct-large deplot biomedclip
    vary-sam-b c-radio-v4-so400m c-radio-v4-h tipsv2-l tipsv2-so400m vitamin-xl-256
"""


def test_every_promised_encoder_is_there_with_source_licence_and_capability():
    entries = catalogue()
    assert set(REQUIRED.split()) <= set(entries)
    for name, entry in entries.items():
        weights = entry["weights"]
        assert weights["source"] and weights["licence"], name
        assert 10 < len(entry["capability"]) < 120, name
        on_hub = entry["type"] in ("hf", "vggt", "depth_anything_3", "pi3", "mapanything", "vivit") or str(
            weights["source"]
        ).startswith("hf-hub:")
        on_hub = on_hub or re.fullmatch(r"[\w-]+/[\w.-]+/[^/]+", weights["source"])
        assert ("revision" in weights) == bool(on_hub), f"{name}: hub sources, and only they, name a revision"


def test_the_catalogue_can_be_listed_without_torch():
    code = "import sys, mllm.encoders.catalogue as c; c.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_catalogue_is_handed_out_as_a_copy():
    catalogue()["clip-vit-b-32"]["type"] = "broken"
    assert catalogue()["clip-vit-b-32"]["type"] == "open_clip"


def test_a_name_a_preset_with_changes_and_a_whole_config_are_understood():
    by_name = encoder_config("clip-vit-b-32", where="model.encoders.a")
    assert by_name.info.grid == (7, 7) and by_name.layers == [-2]
    changed = encoder_config(
        {"preset": "clip-vit-b-32", "image_size": 256, "weights": {"source": "./local.safetensors"}},
        where="model.encoders.a",
    )
    assert changed.info.grid == (8, 8)
    assert (changed.weights.source, changed.weights.licence) == ("./local.safetensors", "MIT")
    assert encoder_config(RAW, where="model.encoders.a").info.grid == (2, 2)
    assert encoder_config({"preset": "clip-vit-b-32", "weights": None}, where="a").weights is None


def test_a_resolved_config_is_taken_as_it_is():
    config = encoder_config("clip-vit-b-32", where="a")
    plain = json.loads(json.dumps(to_plain(config)))
    assert encoder_config(plain, where="a") == config
    plain["info"]["grid"] = [1, 1]  # nothing is measured again
    assert encoder_config(plain, where="a").info.grid == (1, 1)
    assert type(build_encoder(config)).__name__ == "OpenClipEncoder"


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (
            "clip-vit-l-14-33",
            UnknownName,
            ["model.encoders.a: ", "did you mean 'clip-vit-l-14-336'", "mllm list encoders"],
        ),
        ({"preset": "siglip2"}, UnknownName, ["model.encoders.a: ", "siglip2-so400m-384"]),
        ({"type": "open_clp"}, UnknownName, ["model.encoders.a.type: ", "did you mean 'open_clip'"]),
        ({"image_size": 3}, ConfigError, ["model.encoders.a: give preset", "mllm list encoders"]),
        (7, ConfigError, ["model.encoders.a: expected an encoder's name or a mapping, got int"]),
        ({"preset": "clip-vit-b-32", "type": "timm"}, ConfigError, ["model.encoders.a.type: ", "of type open_clip"]),
        ({"preset": "clip-vit-b-32", "layer": [-1]}, ConfigError, ["model.encoders.a.layer: unknown key", "'layers'"]),
        ({"preset": "clip-vit-b-32", "layers": []}, ConfigError, ["model.encoders.a.layers: "]),
        ({**RAW, "patch_size": 3}, ConfigError, ["model.encoders.a.patch_size: 3 does not divide image_size (8, 8)"]),
        ({**RAW, "layers": [-2]}, ConfigError, ["model.encoders.a.layers: "]),
        ({"preset": "clip-vit-b-32", "note": "x"}, ConfigError, ["model.encoders.a.note: unknown key"]),
    ],
)
def test_mistakes_are_told_with_their_place_and_cure(spec, error, words):
    with pytest.raises(error) as caught:
        encoder_config(spec, where="model.encoders.a")
    for word in words:
        assert word in str(caught.value)


def test_licences_that_restrict_use_are_named():
    names = ["clip-vit-b-32", "eupe-b", "vary-sam-b"]
    configs = {f"my_{i}": encoder_config(name, where=name) for i, name in enumerate(names)}
    warnings = licence_warnings(configs)
    assert len(warnings) == 2
    assert (
        "my_1" in warnings[0] and "FAIR Noncommercial" in warnings[0] and "may not be used commercially" in warnings[0]
    )
    assert "my_2" in warnings[1] and "no known licence" in warnings[1]
    local = encoder_config(
        {**RAW, "weights": {"source": "x", "licence": "T", "commercial": True, "territory": "not in X"}}, where="a"
    )
    assert licence_warnings([local]) == ["encoder raw_patches: the weights x (T) are restricted by territory: not in X"]
    assert licence_warnings([encoder_config(RAW, where="a")]) == []


def test_shipped_entries_can_be_checked_by_name():
    kind, _ = find_check("clip-vit-b-32")
    assert kind == "encoder"


def test_encoders_are_found_by_licence_size_kind_objective_and_words():
    free = matching(commercial=True, objective="image-text", most=450)
    assert {"clip-vit-l-14-336", "siglip2-so400m-384", "pe-core-l-336"} <= set(free)
    assert not {"fastvit-mci2", "dinov2-l", "convnext-xxl-clip"} & set(free)
    assert all(entry["weights"]["commercial"] and entry["about"]["millions"] <= 450 for entry in free.values())
    assert set(matching(kind="cnn", least=100)) == {"convnext-l-clip", "convnext-xxl-clip"}
    assert set(matching(licence="cc-by-nc")) >= {"vggt-1b", "hiera-b-mae"} and matching(words="latents early")
    assert list(matching()) == sorted(catalogue())
    with pytest.raises(ConfigError, match=r"kind: no encoder is of 'vti', did you mean 'vit'\? Known: cnn"):
        matching(kind="vti")
    for key, value in (("kind", "snake"), ("licence", "zzz")):  # nothing is like these: the sentence ends all the same
        with pytest.raises(ConfigError, match=rf"{key}: no encoder.* '{value}'\. Known: "):
            matching(**{key: value})


def test_a_list_of_encoders_cuts_no_name_and_filters_nothing_else():
    import os

    narrow = {**os.environ, "COLUMNS": "60"}
    run = [sys.executable, "-m", "mllm.cli.main", "list"]
    shown = subprocess.run(
        [*run, "encoders", "--min-size", "0"], capture_output=True, text=True, env=narrow, check=True
    ).stdout
    for name, entry in catalogue().items():
        (line,) = [line for line in shown.splitlines() if line.split(" ")[0] == name]
        assert entry["weights"]["source"] in line
    assert f"{len(catalogue())} of {len(catalogue())} encoders" in shown.replace("\n", " ")
    refused = subprocess.run([*run, "tasks", "--commercial"], capture_output=True, text=True, env=narrow, check=False)
    assert refused.returncode == 2 and "mllm list encoders" in refused.stderr


def test_filters_that_nothing_can_fit_are_refused():
    with pytest.raises(ConfigError, match=r"licence: .*'apach-2.0', did you mean 'Apache-2.0'\? Known: .*MIT"):
        matching(licence="apach-2.0")
    with pytest.raises(ConfigError, match="at least 500 and at most 100 million"):
        matching(least=500, most=100)
