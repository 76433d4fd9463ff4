"""Do captioned pictures come out whole, with captions on one side only and a test that cannot be answered by the letter?"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mllm.data.captioned import build_captioned, on_white
from mllm.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for kind in ("animals", "plants"):
        (root / kind).mkdir(parents=True)
        for k in range(12):
            Image.new("RGBA", (20, 10), (10 * k, 80, 120, 255)).save(root / kind / f"{k}.png")
            (root / kind / f"{k}.txt").write_text(f"{kind} {k}.\nde.utf8=Nummer {k}\n", encoding="utf-8")
    (root / "plants" / "11.txt").write_text("plants 10.\n")  # a second picture of the same thing
    return root


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_caption_of_the_test_is_trained_on_and_its_options_are_of_the_same_kind(pictures, tmp_path):
    manifest = build_captioned(pictures, tmp_path / "out", num_test=10, size=64)
    train, test = rows(tmp_path / "out" / "train.jsonl"), rows(tmp_path / "out" / "test.jsonl")
    learned = {row["messages"][1]["content"] for row in train}
    asked = {row["caption"] for row in test}
    assert len(test) == len(asked) == 10 and not learned & asked and len(learned | asked) == 23
    kinds = Counter(row["category"] for row in test)
    for row in test:
        assert row["options"]["ABCD".index(row["answer"])] == row["caption"] and len(set(row["options"])) == 4
        assert set(row["options"]) <= asked, "what was trained on would give itself away"
        same = sum(option.startswith(row["category"]) for option in row["options"])
        assert same == min(4, kinds[row["category"]])
    letters = Counter(row["answer"] for row in test)
    assert max(letters.values()) - min(letters.values()) <= 1
    assert {Image.open(tmp_path / "out" / row["image"]).size for row in test} == {(64, 64)}
    assert build_captioned(pictures, tmp_path / "again", num_test=10, size=64) == manifest


def test_bad_pictures_are_counted_with_their_reason(pictures, tmp_path):
    (pictures / "animals" / "0.txt").unlink()
    (pictures / "animals" / "1.txt").write_bytes(b"\xff\xfe bad\n")
    (pictures / "animals" / "2.txt").write_text("\n")
    (pictures / "animals" / "3.txt").write_text("x" * 300)
    (pictures / "animals" / "4.png").write_bytes(b"no picture")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(pictures / "animals" / "5.png")
    (pictures / "animals" / "6.svg").write_text("<svg/>")
    skipped = build_captioned(pictures, tmp_path / "out", num_test=4, size=32)["skipped"]
    assert sum(skipped.values()) == 7 and all(number == 1 for number in skipped.values()), skipped
    with pytest.raises(DataError, match="cannot be read"):
        on_white(pictures / "animals" / "4.png", 32)
    with pytest.raises(ConfigError, match="captions, and 50 are to be kept"):
        build_captioned(pictures, tmp_path / "out", num_test=50)
    with pytest.raises(ConfigError, match="no such folder"):
        build_captioned(pictures / "none", tmp_path / "out")


def test_a_photograph_stands_upright_and_sixteen_bits_keep_their_shades(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    lying.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    shown = on_white(tmp_path / "phone.jpg", 40)
    assert (
        shown.getpixel((20, 5))[2] > 200
        and shown.getpixel((20, 35))[0] > 200
        and shown.getpixel((2, 20)) == (255, 255, 255)
    )
    deep = np.full((10, 10), 100 * 257, np.uint16)
    deep[:5] = 200 * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grays = on_white(tmp_path / "deep.png", 10)
    assert grays.getpixel((5, 1)) == (200, 200, 200) and grays.getpixel((5, 8)) == (100, 100, 100)
