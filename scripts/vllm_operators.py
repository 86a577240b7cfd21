"""What another vLLM's Python calls of C++ that the operators of this environment's vLLM lack, or take otherwise.

usage: vllm_operators.py OLD NEW, each the folder of a `vllm` package; OLD is the one that the operators belong to.

Read from the text: a call `torch.ops._C.name(…)` is compared with the schemas by its number of arguments and their
names. Calls that OLD has too are left out, and of the others so are operators that the CPU never had, unless a file or
an operator is the CPU's by its name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Schemas = dict[tuple[str, str], list[Any]]


@dataclass(frozen=True)
class Call:
    """A call of an operator in vLLM's Python.

    Attributes:
        namespace, name: of the operator.
        positional: how many arguments come without a name; None where there is a `*`.
        named: the others' names; None where there is a `**`.
        where: file and line.
    """

    namespace: str
    name: str
    positional: int | None
    named: tuple[str, ...] | None
    where: str

    @property
    def form(self) -> tuple[Any, ...]:
        """All but where it is."""
        return self.namespace, self.name, self.positional, self.named


def calls(tree: Path) -> Iterator[Call]:
    """Every call of an operator of vLLM's own."""
    for path in sorted(tree.rglob("*.py")):
        if "torch.ops._" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            parts = ast.unparse(node.func).split(".")
            if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5) and parts[2].startswith("_"):
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                names = [keyword.arg for keyword in node.keywords]
                yield Call(
                    parts[2],
                    parts[3],
                    None if starred else len(node.args),
                    None if None in names else tuple(sorted(filter(None, names))),
                    f"{path.relative_to(tree)}:{node.lineno}",
                )


def fits(call: Call, schema: Any) -> bool:
    """Whether a schema takes a call's arguments, as far as their number and names tell."""
    if call.positional is None or call.named is None:
        return True
    if call.positional > len(schema.arguments):
        return False
    rest = {argument.name: argument for argument in schema.arguments[call.positional :]}
    needed = {name for name, argument in rest.items() if not argument.has_default_value()}
    return needed <= set(call.named) <= rest.keys()


def differences(old: Path, new: Path, schemas: Schemas) -> list[str]:
    """A line for each call of `new` that the operators may not serve."""
    known = {call.form for call in calls(old)}
    lines = []
    for call in calls(new):
        if call.form in known:
            continue
        name = f"{call.namespace}::{call.name}"
        candidates = schemas.get((call.namespace, call.name))
        if candidates is None:
            if "cpu" in f"{call.where} {call.name}".lower():
                lines.append(f"no such operator: {name}, called in {call.where}")
        elif not any(fits(call, schema) for schema in candidates):
            taken = "; ".join(map(str, candidates))
            given = f"{call.positional} arguments" + "".join(f", {named}=" for named in call.named or ())
            lines.append(f"another schema: {name}, called in {call.where} with {given}\n  {taken}")
    return lines


def registered() -> Schemas:
    """The schemas of the operators of the vLLM of this Python."""
    import torch
    from vllm import _custom_ops  # noqa: F401  it loads them

    found: Schemas = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        found.setdefault((namespace, name), []).append(schema)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: vllm_operators.py OLD NEW")
    for line in differences(Path(sys.argv[1]), Path(sys.argv[2]), registered()):
        print(line)
