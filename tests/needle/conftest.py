import sys
from pathlib import Path

# `benchmarks` is not part of the installed package, and pytest alone does not look in the root.
sys.path.insert(0, str(Path(__file__).parents[2]))
