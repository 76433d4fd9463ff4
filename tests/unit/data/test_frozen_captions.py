"""Does a frozen benchmark of captioned pictures come out the same, and is another one told?"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mllm.cli.main import main
from mllm.data.captioned import build_captioned
from mllm.data.frozen_captions import freeze_captions, is_of_captions, load_frozen_captions, rebuild_captions
from mllm.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for number in range(12):
        folder = root / ("animals" if number % 2 else "food")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"Thing number {number}.\n")
    return root


@pytest.fixture
def manifest(pictures, tmp_path):
    build_captioned(pictures, tmp_path / "first", num_test=5, size=16)
    path = tmp_path / "frozen.yaml"
    freeze_captions(tmp_path / "first", path, source=str(pictures), description="test", package="things 1.0")
    return path


def test_the_same_folder_gives_the_frozen_questions_and_pixels(manifest, pictures, tmp_path):
    frozen, differences = rebuild_captions(str(manifest), tmp_path / "second")
    assert (frozen.num_questions, frozen.settings["num_test"], differences) == (5, 5, [])
    for path in (tmp_path / "second" / "test").glob("*.png"):
        assert (tmp_path / "first" / "test" / path.name).read_bytes() == path.read_bytes()
    for path in pictures.rglob("*.png"):
        Image.open(path).rotate(180).save(path)
    _, differences = rebuild_captions(str(manifest), tmp_path / "third")
    assert differences == ["the same questions about other pixels (Pillow or the pictures differ)"]


def test_other_captions_and_a_folder_that_is_not_there_are_refused(manifest, pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; it comes with things 1\.0; --source"):
        rebuild_captions(str(manifest), tmp_path / "second", source=tmp_path / "nowhere")
    for path in pictures.rglob("*.txt"):
        path.write_text(path.read_text().replace("Thing", "Sort"))
    with pytest.raises(DataError, match=r"other questions than the frozen ones.*differ from things 1\.0"):
        rebuild_captions(str(manifest), tmp_path / "second")


def test_the_command_takes_both_sorts(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mllm", "data", "rebuild", str(manifest), "--output", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and "5 questions, the frozen ones" in capsys.readouterr().out
    assert is_of_captions("stamps") and not is_of_captions("real_charts")
    assert load_frozen_captions("stamps").num_questions == 150
    for wrong in (["real_charts", "--source", "x"], ["stamps", "--renderers", "gnuplot"]):
        monkeypatch.setattr("sys.argv", ["mllm", "data", "rebuild", *wrong])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code
