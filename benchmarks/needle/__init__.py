"""A tiny Llama that really retrieves, its tasks, its training and its evaluation."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoints" / "needle"
"""Trained with the landmark loss; use it to check an implementation of sparse attention."""

TWIN_CHECKPOINT = Path(__file__).parent / "checkpoints" / "twin"
"""Trained equally long without the landmark loss; the honest control."""
