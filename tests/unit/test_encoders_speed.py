"""Does the benchmark of encoders beside the authors' modules count, stop, report and survive as it says?"""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import encoders_authors, encoders_speed


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 9)
        self.mask_token = nn.Parameter(torch.zeros(7))

    def forward(self, x):
        return self.head(self.neck(self.body(x)))


def test_only_what_ours_has_is_counted_and_run():
    module = Parts()
    theirs = encoders_authors.Theirs(
        module, encoders_authors.stopping_at(module, "neck"), ("neck", "head", "mask_token")
    )
    assert theirs.millions() * 1e6 == pytest.approx(4 * 3 + 3)
    x = torch.randn(2, 4)
    assert torch.equal(theirs.run(x), module.body(x))
    with pytest.raises(AttributeError):
        encoders_authors.stopping_at(module, "tail")


def test_every_type_of_the_catalogue_has_an_author_or_a_reason():
    types = {encoders_speed._type_of(name) for name in encoders_speed.names_of_catalogue()}
    assert (
        types
        == set(encoders_authors.BUILDERS) | set(encoders_authors.WITHOUT_CODE) | {"davit", "timm", "hiera"} & types
    )


def entry(name: str, who: str, speed: float | None, **others) -> dict:
    told = {"images_per_second": speed, "gib": 1.0, "size": [224, 224], "millions": 2.0} if speed else {}
    return {"name": name, "who": who, **told, **others}


def test_the_table_says_ratios_counts_and_why_not():
    found = [
        entry("s4d-vit-b-160", "ours", 12.0),
        entry("s4d-vit-b-160", "authors", 10.0, differs="no bias of keys", millions=1.5),
        entry("biformer-t", "ours", 9.0),
        entry("biformer-t", "authors", 10.0),
        entry("vssd-tiny", "ours", 9.0),
        entry("vssd-tiny", "authors", None, error="ImportError: no mamba_ssm"),
        entry("vir-s-16", "ours", 7.0),
    ]
    rows = {row[0]: row for row in encoders_speed.rows(found, compiled=False)}
    assert rows["s4d-vit-b-160"][-4:] == ("authors", "10.0", "1.20", "-0.50 M no bias of keys")[-4:]
    assert rows["biformer-t"][-2:] == ("0.90", "=")
    assert "no mamba_ssm" in rows["vssd-tiny"][-3] and rows["vssd-tiny"][-2:] == ("", "")
    assert rows["vir-s-16"][-3] == "no public code"
    first, second = encoders_speed.goals(found)
    assert first.endswith("1 of 2: below biformer-t 0.90")
    assert second.endswith("0 of 1: below s4d-vit-b-160 1.20")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        device="cpu", dtype="float32", batch=1, warm=0, repeats=1, authors=tmp_path, compile=False, elsewhere=tmp_path
    )


def test_a_family_that_fails_is_told_and_the_others_are_measured(options: argparse.Namespace, capfd):
    options.authors.joinpath("ddrnet", "segmentation").mkdir(parents=True)
    file = options.authors / "ddrnet" / "segmentation" / "DDRNet_23.py"
    file.write_text("print('loud')\nimport a_package_that_is_not_there\n", encoding="utf-8")
    jobs = [("ddrnet-23-slim", "authors"), ("biformer-t", "authors"), ("vir-s-16", "authors")]
    told, absent, never = encoders_speed.section(jobs, options, 60)
    assert told["error"] == "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"
    assert absent["error"].startswith("FileNotFoundError: no folder biformer in")
    assert never["error"] == "no public code"
    assert "loud" not in capfd.readouterr().out


def test_a_fork_that_takes_too_long_or_dies_is_told(options: argparse.Namespace, monkeypatch):
    monkeypatch.setattr(encoders_speed, "measure", lambda *_: torch.multiprocessing.Event().wait())
    (late,) = encoders_speed.section([("vir-s-16", "ours")], options, 0.2)
    assert late["error"] == "longer than 0 s"
    monkeypatch.setattr(encoders_speed, "measure", lambda *_: encoders_speed.os._exit(3))
    (dead,) = encoders_speed.section([("vir-s-16", "ours")], options, 30)
    assert dead["error"] == "the process ended with code 3"
