"""What a tiny model needs beside its weights to be asked about images: processor, tokenizer, and the images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sharp_model import VOCABULARY

IMAGE, START, END, VIDEO, VIDEO_START, VIDEO_END = range(VOCABULARY - 6, VOCABULARY)
"""Special tokens. A prompt has `IMAGE` once for each image, and vLLM puts as many there as the image takes."""
OPTIONS = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 2, "video": 0}, "max_model_len": 1024}

Fields = dict[str, Any]


@dataclass(frozen=True)
class Processor:
    """What differs of config.json, what processor_config.json and preprocessor_config.json say, and tokens' names."""

    config: Fields
    processor: Fields
    preprocessor: Fields
    names: dict[int, str]


def _squares(kind: str, image_processor: str, patch_size: int, names: dict[int, str], frames: int = 1) -> Processor:
    """Of Qwen VL and GLM-V: two by two patches are a token, and at most 200 an image.

    Args:
        kind: of `Processor`.
        image_processor: its class.
        patch_size: in pixels.
        names: of tokens.
        frames: that the limit of an image's pixels counts.
    """
    pixels = 4 * frames * patch_size**2
    return Processor(
        {
            **{"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START},
            **{"vision_end_token_id": END, "image_start_token_id": START, "image_end_token_id": END},
            **{"video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END},
        },
        {"processor_class": f"{kind}Processor"},
        {
            **{"image_processor_type": image_processor, "patch_size": patch_size, "merge_size": 2},
            **{"temporal_patch_size": 2, "size": {"shortest_edge": pixels, "longest_edge": 200 * pixels}},
        },
        names,
    )


def _qwen(kind: str, patch_size: int) -> Processor:
    names = {IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>", VIDEO: "<|video_pad|>"}
    return _squares(kind, "Qwen2VLImageProcessor", patch_size, names)


def _glm() -> Processor:
    names = {IMAGE: "<|image|>", START: "<|begin_of_image|>", END: "<|end_of_image|>"}
    names |= {VIDEO: "<|video|>", VIDEO_START: "<|begin_of_video|>", VIDEO_END: "<|end_of_video|>"}
    return _squares("Glm4v", "Glm4vImageProcessor", 14, names, frames=2)


PROCESSORS = {
    "mistral-3.1": Processor(
        {"image_token_index": IMAGE},
        {"processor_class": "PixtralProcessor", "patch_size": 16, "spatial_merge_size": 2},
        {
            **{"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 384}},
            "patch_size": {"height": 16, "width": 16},
        },
        {IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"},
    ),
    "internvl-3": Processor(
        {"image_token_id": IMAGE},
        {"processor_class": "InternVLProcessor", "image_seq_length": 256},
        {
            **{"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448}},
            **{"crop_to_patches": True, "max_patches": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        },
        {IMAGE: "<IMG_CONTEXT>", START: "<img>", END: "</img>", VIDEO: "<video>"},
    ),
    "qwen2-vl": _qwen("Qwen2VL", 14),
    "qwen2.5-vl": _qwen("Qwen2_5_VL", 14),
    "qwen3-vl": _qwen("Qwen3VL", 16),
    "qwen3-vl-moe": _qwen("Qwen3VL", 16),
    "qwen3.5": _qwen("Qwen3VL", 16),
    "qwen3.5-moe": _qwen("Qwen3VL", 16),
    "glm-4.1v": _glm(),
    "glm-4.5v": _glm(),
}
# By these names InternVL's processor asks its tokenizer.
ROLES = {IMAGE: "context_image_token", START: "start_image_token", END: "end_image_token", VIDEO: "video_token"}


def write_processor(name: str, folder: Path) -> None:
    """Puts a processor beside the model of this name; a token of text is its number, in three digits."""
    of_model = PROCESSORS[name]
    words = {of_model.names.get(token, f"{token:03d}"): token for token in range(VOCABULARY)}
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": token, "content": content, **plain} for token, content in of_model.names.items()]
    files = {
        "config.json": json.loads((folder / "config.json").read_text()) | of_model.config,
        "processor_config.json": of_model.processor,
        "preprocessor_config.json": of_model.preprocessor,
        "tokenizer.json": {
            **{"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "WhitespaceSplit"}},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "000"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "extra_special_tokens": {
                ROLES[token]: of_model.names[token] for token in ROLES.keys() & of_model.names.keys()
            },
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))


def image(seed: int) -> Image.Image:
    """Noise, 320 by 288 pixels: from 90 tokens on, 256 in InternVL."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (288, 320, 3), dtype=np.uint8))
