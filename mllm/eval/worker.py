"""What does one of several processes of an evaluation run? `mllm.eval.launch` starts it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from mllm.errors import MllmError
from mllm.eval.launch import PARENT, follow
from mllm.eval.run import run_eval


def main(arguments: Mapping[str, Any]) -> None:
    """One worker."""
    if PARENT in os.environ:
        follow(int(os.environ[PARENT]))
    try:
        run_eval(**arguments)
    except MllmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
