"""What does one of several processes of an evaluation run? `mllm.eval.launch` starts it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mllm.errors import MllmError
from mllm.eval.launch import PARENT, follow
from mllm.eval.run import run_eval
from mllm.eval.settings import EvalSettings
from mllm.noise import hush


def main(checkpoint: str, tasks: list[str], settings: dict[str, Any]) -> None:
    """One worker. settings: `EvalSettings` as JSON has it."""
    if PARENT in os.environ:
        follow(int(os.environ[PARENT]))
    hush()
    try:
        run_eval(checkpoint, tasks, EvalSettings.model_validate(settings))
    except MllmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
