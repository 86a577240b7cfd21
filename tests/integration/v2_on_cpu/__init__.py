"""Runs vLLM's V2 model runner, the default on GPUs, on a CPU: Triton's interpreter in place of a Triton for CPUs.

vLLM ships a CPU worker for this runner; it expects the `triton-cpu` fork. Import `interpreter` before vLLM.
"""
