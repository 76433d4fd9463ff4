"""Are the phases of a start told, with what they took, and only when asked for?"""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from mllm import progress


@pytest.fixture
def telling(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    progress.begin()
    yield
    progress.end()


def test_phases_tell_their_begin_their_beat_and_what_was_read(telling, capsys, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.05)
    with progress.phase("reading weights") as reading:
        time.sleep(0.12)
        reading.num_bytes = 2 * 10**9
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[ +\d+\.\d s\] reading weights …", lines[0])
    assert "still reading weights (0 s)" in lines[1]
    assert re.search(r"reading weights: 2\.00 GB in 0\.\d s, \d+\.\d\d GB/s", lines[-1])


def test_nothing_is_told_before_begin_after_end_and_on_other_processes(capsys, monkeypatch):
    with progress.phase("a"):
        progress.tell("b")
    monkeypatch.setenv("RANK", "1")
    progress.begin()
    with progress.phase("c"):
        progress.tell("d")
    progress.end()
    assert capsys.readouterr().err == ""


def test_a_phase_ends_with_an_error(telling):
    with pytest.raises(ValueError, match="x"), progress.phase("a"):
        raise ValueError("x")


def test_training_says_something_before_torch_is_imported():
    """The first line must not wait for imports of several seconds."""
    script = (
        "import sys\nfrom mllm import progress\n"
        "def told(text):\n"
        "    assert 'torch' not in sys.modules, 'the first line came after torch'\n    raise SystemExit(3)\n"
        "progress.tell = told\nfrom mllm.cli.main import app\napp(['train', 'demo'])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 3


def test_a_long_count_without_steps_is_told_where_there_is_no_terminal(monkeypatch):
    import io

    from rich.console import Console

    from mllm.train.observe import progress as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    display = module.StageDisplay("answer", active=True, console=Console(file=out, width=120))
    display.start(1200, what="features")
    for step in range(1, 101):
        now[0] = step / 2
        display.update(step, None)
    assert out.getvalue().splitlines() == ["features 61/1,200, 2.0/s, 9.5 min left"]
    display.start(10)  # a stage's own steps are told by their records
    now[0] += 100
    display.update(5, None)
    assert len(out.getvalue().splitlines()) == 1


def test_a_command_called_from_python_tells_nothing_after_it(capsys, monkeypatch):
    from mllm.cli.common_options import _with_common

    monkeypatch.delenv("RANK", raising=False)
    _with_common(progress.begin, "doctor")()
    progress.tell("later")
    assert capsys.readouterr().err == ""
