"""The engines of tests/integration are asked here too, on a GPU."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integration"))
