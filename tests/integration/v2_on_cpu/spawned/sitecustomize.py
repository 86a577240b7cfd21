"""Python imports this file when it starts, if its folder is in PYTHONPATH: for processes that vLLM spawns."""

import v2_on_cpu.interpreter  # noqa: F401
