"""The picture of `plan --plot`."""

from __future__ import annotations

from pathlib import Path

from vllm_shadowkv.cli.pool_plan import BACKENDS, Plan

COLOURS = {"bf16": "#4c78a8", "fp8": "#9ecae9", "shadowkv": "#54a24b"}
LABELS = {"bf16": -14, "shadowkv": 7}
"""Whose points have their numbers beside them, and how far above, in points."""


def draw(plan: Plan, path: str) -> None:
    """Draws the requests that fit at each context.

    Args:
        plan: what to draw.
        path: a file; its ending says the format.

    Raises:
        ValueError: matplotlib is not installed, or cannot write such a file; one sentence.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "shadowkv: --plot needs matplotlib, which is not installed; run pip install 'vllm-shadowkv[bench]'."
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for backend in BACKENDS:
        counts = [plan.requests(backend, tokens) for tokens in plan.contexts]
        axes.plot(plan.contexts, counts, marker="o", color=COLOURS[backend], label=backend)
        for tokens, count in zip(plan.contexts, counts, strict=True) if backend in LABELS else ():
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(str(count), (tokens, count), (0, LABELS[backend]), **place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1)
    counts = [plan.requests(backend, tokens) for backend in BACKENDS for tokens in plan.contexts]
    axes.set_ylim(min(counts) * 0.5, max(*counts, 1) * 1.6)
    axes.set_xticks(plan.contexts, [f"{tokens:,}" for tokens in plan.contexts], rotation=30)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("requests side by side")
    shape = plan.shape
    axes.set_title(
        f"{plan.device_bytes / 2**30:g} GiB of KV cache; {shape.num_layers} layers, "
        f"{shape.num_kv_heads} KV heads of {shape.head_size}, rank {plan.pool.layout.rank}; "
        f"host pool {plan.host_pool_bytes / 2**30:.0f} GiB",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        endings = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise ValueError(f"shadowkv: cannot write {Path(path)} ({error}); use one of {endings}.") from error
    finally:
        pyplot.close(figure)
