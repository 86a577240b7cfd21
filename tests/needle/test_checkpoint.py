from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.needle import CHECKPOINT, TWIN_CHECKPOINT
from benchmarks.needle.evaluate import ShadowOptions, answers, load_model, shadow
from benchmarks.needle.tasks import FAMILIES, VOCAB, make_prompt

CHECKPOINTS = pytest.mark.parametrize("path", [CHECKPOINT, TWIN_CHECKPOINT], ids=lambda p: p.name)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
def share_answered(model: torch.nn.Module, num_tokens: int, num_prompts: int) -> float:
    right = 0
    for i in range(num_prompts):
        prompt = make_prompt(FAMILIES[i % len(FAMILIES)], num_tokens, 10_000 + i)
        answer = torch.tensor(prompt.answer_ids)
        # Every answer token must be the most likely one after the right ones before it, which
        # is the same as greedy decoding giving the whole answer.
        token_ids = torch.tensor([prompt.token_ids + prompt.answer_ids[:-1]])
        logits = model(token_ids, logits_to_keep=len(answer)).logits
        right += torch.equal(logits[0].argmax(-1), answer)
    return right / num_prompts


@CHECKPOINTS
def test_answers_in_transformers(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert share_answered(model, num_tokens=1024, num_prompts=40) >= 0.95


def test_answers_in_bfloat16() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    assert model.dtype == torch.bfloat16
    assert share_answered(model, num_tokens=256, num_prompts=12) >= 0.9


def test_own_forward_agrees_with_transformers() -> None:
    prompt = make_prompt("multi_query", 300, 0)
    token_ids = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)(token_ids).logits
        positions = torch.arange(300)[None]
        got, _, _ = load_model(CHECKPOINT)(token_ids, positions, wanted=positions)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_greedy_generation_gives_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    prompt = make_prompt("multi_value", 512, 1)
    inputs = tokenizer(prompt.text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=len(prompt.answer_ids))
    assert tokenizer.decode(output[0, len(prompt.token_ids) :]) == prompt.answer


@CHECKPOINTS
def test_tokenizer_round_trips(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = make_prompt("mixed", 512, 0)
    assert tokenizer(prompt.text).input_ids == prompt.token_ids
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert tokenizer.convert_ids_to_tokens(range(len(VOCAB))) == VOCAB


def test_selection_matters() -> None:
    """Landmarks find what random chunks do not: the model can tell good selection from bad."""
    model = load_model(CHECKPOINT)
    makers = {
        "landmarks": shadow(ShadowOptions()),
        "random": shadow(ShadowOptions(random_selection=True)),
    }
    counts = dict.fromkeys(makers, 0)
    for seed in range(10):
        prompt = make_prompt("multi_key", 2048, seed)
        for name, right in answers(model, prompt.token_ids, prompt.answer_ids, makers).items():
            counts[name] += right
    assert counts["landmarks"] >= 9
    assert counts["random"] <= 3


@CHECKPOINTS
def test_config_allows_long_prompts(path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(path).config
    assert config.max_position_embeddings == 32768
    assert config.tie_word_embeddings
