"""Exact attention, by the library that computes it; `library.py` is what all of them are."""
