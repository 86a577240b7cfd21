"""Python imports this file when it starts, if its folder is in PYTHONPATH: for processes that vLLM spawns."""

import without_torchvision

without_torchvision.install()
