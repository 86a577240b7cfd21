"""The real decoder: how it is fetched and converted, on a tiny one; and where an index has it, that it speaks."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.smollm2.convert import LAYER, convert
from benchmarks.wheels import Cached, MissingError, Wheel, unpack

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [*bytes_to_unicode().values()]
TOKENS = [*CONTROL, *LETTERS, "12", "th", "the", "Ġthe"]
MERGES = ["1 2", "t h", "th e", "Ġ the"]


def to_gguf(model: LlamaForCausalLM, file: Path, kind: GGMLQuantizationType, pre: str = "smollm") -> None:
    """As llama.cpp writes it: rows of a head by pairs of RoPE's dimensions."""
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    for number, add in enumerate((writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(number)
    writer.add_pad_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}" for ours, theirs in LAYER.items()}
    for name, ours in names.items():
        weight = model.state_dict()[f"{name}.weight"].numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if name.endswith(part):
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        raw = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{ours}.weight", quantize(np.ascontiguousarray(weight), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_converted_model_computes_the_same(model: LlamaForCausalLM, tmp_path: Path) -> None:
    to_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.F32)
    convert(tmp_path / "model.gguf", tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)


def test_four_bits_become_what_they_stand_for(model: LlamaForCausalLM, tmp_path: Path) -> None:
    to_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.Q4_1)
    convert(tmp_path / "model.gguf", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.state_dict()[name].numpy()
    known = dequantize(quantize(weight, GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()[name]
    np.testing.assert_array_equal(found.numpy(), known)
    assert 0 < np.abs(known - weight).max() < 0.01


def test_the_tokenizer_leaves_digits_alone_and_knows_what_is_no_text(model: LlamaForCausalLM, tmp_path: Path) -> None:
    to_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.F32)
    convert(tmp_path / "model.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = "the 12 the é\n"
    ids = tokenizer(said)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:5] == ["the", "Ġ", "1", "2", "Ġthe"]
    assert tokenizer.decode(ids) == said
    assert tokenizer("<|im_start|>the<|im_end|>")["input_ids"] == [1, TOKENS.index("the"), 2]


def test_another_tokenizer_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    to_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.F32, pre="llama-bpe")
    with pytest.raises(ValueError, match="holds llama, gpt2, llama-bpe; only llama"):
        convert(tmp_path / "model.gguf", tmp_path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """The only wheel that pip can find, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = folder / "some_data-1.0-py3-none-any.whl"
    info = "some_data-1.0.dist-info"
    content = {
        "some_data/words.txt": "words",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with ZipFile(file, "w") as wheel:
        for name, text in content.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Wheel("some-data", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 0.1)


def words(content: ZipFile, folder: Path) -> None:
    unpack(content, "some_data/words.txt", folder)


def test_data_is_fetched_once(index: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Cached("words-1", index, words, "make words")
    with pytest.raises(MissingError, match="is missing; `make words` makes it"):
        data.get()
    assert (data.make() / "words.txt").read_text() == "words"
    assert [path.name for path in data.path.parent.iterdir()] == [data.path.name]
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert data.make() == data.get()


def test_data_that_is_something_else_is_not_used(index: Wheel) -> None:
    data = Cached("words-1", replace(index, sha256="00" * 32), words, "make words")
    with pytest.raises(MissingError, match=r"has the sha256 .*, not 0000"):
        data.make()
    assert not data.path.exists()


def test_data_that_no_index_has(index: Wheel) -> None:
    data = Cached("words-1", replace(index, version="2.0"), words, "make words")
    with pytest.raises(MissingError, match=r"some-data==2.0 cannot be fetched .*No matching distribution"):
        data.make()


def test_data_is_complete_or_not_there(index: Wheel) -> None:
    def half(content: ZipFile, folder: Path) -> None:
        words(content, folder)
        raise OSError("no space left on device")

    data = Cached("words-1", index, half, "make words")
    with pytest.raises(OSError, match="no space"):
        data.make()
    assert list(data.path.parent.iterdir()) == []


def test_of_two_that_fetch_at_once_the_first_counts(index: Wheel) -> None:
    data = Cached("words-1", index, words, "make words")

    def overtaken(content: ZipFile, folder: Path) -> None:
        words(content, folder)
        data.path.mkdir()
        (data.path / "words.txt").write_text("the first")

    assert (replace(data, recipe=overtaken).make() / "words.txt").read_text() == "the first"


@pytest.mark.slow
def test_the_real_model_is_what_it_is_said_to_be(real_decoder: Path) -> None:
    config = json.loads((real_decoder / "config.json").read_text())
    heads = [config[f"num_{kind}"] for kind in ("hidden_layers", "attention_heads", "key_value_heads")]
    assert (heads, config["max_position_embeddings"]) == ([30, 9, 3], 8192)
    tokenizer = AutoTokenizer.from_pretrained(real_decoder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(real_decoder, dtype=torch.float32)
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."
