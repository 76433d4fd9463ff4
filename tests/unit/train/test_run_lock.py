"""Are two runs kept out of one folder, and does a killed run leave it open?"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mllm.errors import ConfigError
from mllm.train.checkpoint.own_folders import OwnFolders
from mllm.train.checkpoint.run_lock import FILE, only_run_in

HOLDER = """
import os, sys, time
from pathlib import Path
from mllm.train.checkpoint.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data worker, which outlives a killed parent for a while
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_one_of_a_killed_run_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"process {process.pid} on .*end that run first"), only_run_in(tmp_path):
        raise AssertionError("two runs in one folder")
    machine = object.__new__(OwnFolders)  # one of several that share no folder, without the others
    machine._number = 1
    with pytest.raises(ConfigError, match=rf"process {process.pid} on "), machine.only_run_in(tmp_path):
        raise AssertionError("a run of several machines and another in one machine's own folder")
    machine._number = 0
    with machine.only_run_in(tmp_path):
        pass  # the first machine's command has asked
    process.kill()
    process.wait()
    began = time.monotonic()
    with only_run_in(tmp_path):
        assert "host" in (tmp_path / FILE).read_text()
    assert time.monotonic() - began < 3
    assert not (tmp_path / FILE).exists()
