"""What is kept of a command that Ctrl-C stops, and how does one go on?"""

from __future__ import annotations

_AGAIN = "the same command begins again"
_ON = "the same command goes on there"
_NOTHING = f"nothing was changed; {_AGAIN}"
_NO_RESULT = f"its result is not written; {_AGAIN}"
_ANSWERS = "the answers so far are kept; the same command goes on where it was"
_HALF = "what it was writing may be incomplete: remove it, then give the same command again"

KEPT: dict[str, str] = {
    "demo": "data and checkpoints so far are kept; the same command with --resume goes on",
    "train": f"nothing was begun; {_AGAIN}",
    "tokenizer train": f"nothing was begun; {_AGAIN}",
    "study": "arms that are trained and evaluated are kept; the same command goes on with the others",
    "eval run": _ANSWERS,
    "eval ablate": _ANSWERS,
    "eval sensitivity": _ANSWERS,
    "eval budgets": _ANSWERS,
    "eval watch": "checkpoints that are evaluated are kept; the same command goes on with the others",
    "eval judge": f"the verdicts so far are kept; {_ON}",
    "eval rescore": f"files that were not reached are as they were; {_AGAIN}",
    "eval export": _HALF,
    "eval mine": _NO_RESULT,
    "batch": f"the answers so far are kept; {_ON}",
    "route label": f"the samples so far are kept; {_ON}",
    "tokenizer encode": f"whole shards are kept; {_ON}",
    "push": "what is uploaded stays there; the same command uploads the rest",
    "chat": "the conversation is not kept",
    "draw": "pictures that were drawn are kept",
    "edit": "no picture was written",
    "serve": "no server was running yet",
    "app": "nothing was being kept",
    "convert": _HALF,
    "export": _HALF,
    "compose": _HALF,
    "parts get": _HALF,
    "data build charts": _HALF,
    "data build captions": _HALF,
    "data build pairs": _HALF,
    "data build questions": _HALF,
    "data rebuild": _HALF,
    "data freeze": _NO_RESULT,
    "data points": "the files that are finished are kept; the same command writes those that are missing",
    **dict.fromkeys(
        (
            "eval compare", "eval report", "eval stress", "eval contamination", "eval leaderboard", "eval scores", "eval import",
            "eval attack", "encoders probe", "bench serve", "route report", "tokenizer eval", "inspect", "parity", "verify-resume",
        ),
        _NO_RESULT,
    ),
    **dict.fromkeys(
        (
            "new", "plan", "list", "check", "doctor", "runs ls", "runs diff", "data check", "recipes ls", "recipes show", "recipes cp",
            "recipes schema", "tokenizer ls", "parts ls",
        ),
        _NOTHING,
    ),
}  # fmt: skip
"""Command → what stands, and what to type. Training itself says more: which step is saved."""
