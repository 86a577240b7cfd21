from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
from simulation import shadow_groups
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state.boundary import ExactBoundary
from vllm_shadowkv.state.capacity import Capacity

GIB = 2**30
MAX_MODEL_LEN = 131_072

# Llama-3.1-8B.
LAYERS = [f"model.layers.{layer}.self_attn.attn" for layer in range(32)]
SHAPE: dict[str, Any] = {"num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}

init_none_hash(sha256)


class Pool:
    """A KV cache of some bytes, filled with decoding requests of one length.

    Args:
        groups: of the model's layers.
        num_bytes: of all layers' pages.
        step_tokens: most tokens of a step.
    """

    def __init__(self, groups: list[KVCacheGroupSpec], num_bytes: int, step_tokens: int) -> None:
        page_bytes = {group.kv_cache_spec.page_size_bytes for group in groups}
        assert len(page_bytes) == 1, "groups share pages of one size"
        block_bytes = len(LAYERS) * page_bytes.pop()
        self.block_size = max(group.kv_cache_spec.block_size for group in groups)
        self.hash_size = min(
            spec.block_size for spec in map(attrgetter("kv_cache_spec"), groups) if spec.prefix_cacheable
        )
        self.manager = KVCacheManager(
            KVCacheConfig(num_bytes // block_bytes, [], groups),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_size,
            max_in_flight_tokens=step_tokens,
        )
        self.step_tokens = step_tokens
        self.running: list[Request] = []

    def fill(self, tokens: int) -> int:
        """Admits prompts of `tokens` tokens one after the other until one does not fit; returns how many do."""
        while self.admit(tokens):
            pass
        return len(self.running)

    def admit(self, tokens: int, wait: bool = False) -> bool:
        """Prefills a prompt, if it is admitted. While it is prefilled the others decode, unless they `wait`."""
        first = len(self.running) * 1_000_000
        new = Request(
            request_id=str(len(self.running)),
            prompt_token_ids=list(range(first, first + tokens)),
            sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN - tokens),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.hash_size, sha256),
        )
        # The others go on decoding, one token in a step; they come first.
        while new.num_computed_tokens < tokens:
            for request in () if wait else self.running:
                self.decode(request)
            first_chunk = new.num_computed_tokens == 0
            count = min(self.step_tokens - len(self.running), tokens - new.num_computed_tokens)
            if self.manager.allocate_slots(new, count, full_sequence_must_fit=first_chunk) is None:
                assert first_chunk, "admitted, and then out of blocks"
                return False
            new.status = RequestStatus.RUNNING
            new.num_computed_tokens += count
        self.running.append(new)
        if wait:
            return True
        # It counts once it decodes and what only its prefill needed is back.
        for _ in range(3):
            for request in self.running:
                self.decode(request)
        return True

    def held(self, request: Request) -> int:
        """Blocks of a request, all groups."""
        groups = self.manager.get_blocks(request.request_id).blocks
        return sum(not block.is_null for blocks in groups for block in blocks)

    def decode(self, request: Request) -> None:
        """One token more."""
        request.append_output_token_ids(7)
        assert self.manager.allocate_slots(request, 1) is not None, "a decoding request would be preempted"
        request.num_computed_tokens += 1


def stock_groups(block_size: int) -> list[KVCacheGroupSpec]:
    return [KVCacheGroupSpec(LAYERS, FullAttentionSpec(block_size=block_size, **SHAPE))]


def planned(step_tokens: int, **settings: Any) -> Capacity:
    """As `Runtime` makes it."""
    config = ShadowKVConfig(**settings)
    layout = plan_page(config, SHAPE["num_kv_heads"], SHAPE["head_size"], SHAPE["dtype"])
    return Capacity.of(config, layout, len(LAYERS), ExactBoundary.of(config, step_tokens, MAX_MODEL_LEN))


def our_groups(step_tokens: int, **settings: Any) -> list[KVCacheGroupSpec]:
    """What `Runtime` and the layers of the model make."""
    held = planned(step_tokens, **settings)
    layout = held.layout
    return shadow_groups(held.boundary, held.slot_pages, layout.page_bytes, layers=LAYERS, **SHAPE)


STEP_TOKENS = 8192
POOL = 64 * GIB


def capacity(tokens: int, stock_block_size: int = 128, **settings: Any) -> float:
    """How many times as many requests our pool holds as the stock one."""
    stock = Pool(stock_groups(stock_block_size), POOL, STEP_TOKENS).fill(tokens)
    ours = Pool(our_groups(STEP_TOKENS, **settings), POOL, STEP_TOKENS).fill(tokens)
    print(f"{tokens} tokens: {ours} requests, {stock} with the stock spec, {ours / stock:.2f} times")
    return ours / stock


def test_the_stock_pool_holds_what_its_bytes_say() -> None:
    # 15 GiB a request of 122,880 tokens.
    assert Pool(stock_groups(128), POOL, STEP_TOKENS).fill(122_880) == 4
    assert Pool(stock_groups(16), POOL, STEP_TOKENS).fill(122_880) == 4


def test_a_decoding_request_takes_the_pages_that_the_design_counts() -> None:
    pool = Pool(our_groups(STEP_TOKENS), POOL, STEP_TOKENS)
    assert pool.fill(122_880) > 1
    for request in pool.running:
        sealed, exact, slots = pool.manager.get_blocks(request.request_id).blocks
        assert len(sealed) == 121, "120 sealed blocks and the open one"
        assert sum(not page.is_null for page in exact) <= 9
        assert len(slots) in range(24, 28)


@pytest.mark.parametrize("stock_block_size", [16, 128])
def test_four_and_a_half_times_the_requests_of_61440_tokens(stock_block_size: int) -> None:
    assert capacity(61_440, stock_block_size) >= 4.5


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"prefill_exact_tokens": 32_768}, id="prefill_exact_tokens=32768"),
    ],
)
def test_six_times_the_requests_of_122880_tokens(settings: dict[str, Any]) -> None:
    assert capacity(122_880, **settings) >= 6


# -- The same by formula ---------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"slot_chunks": 768, "compression": 4},
    {"dense_threshold": 0, "prefill_exact_tokens": 0},
    {"dense_threshold": 20_000, "decode_exact_tokens": 3000, "block_size": 512},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pages_of_a_decoding_request_by_formula(settings: dict[str, Any]) -> None:
    pool = Pool(our_groups(STEP_TOKENS, **settings), POOL, STEP_TOKENS)
    capacity = planned(STEP_TOKENS, **settings).resolve(pool.manager.block_pool.num_gpu_blocks)
    for prompt in (1000, 4090, 19_990, 40_900):
        assert pool.admit(prompt, wait=True)
        request = pool.running[-1]
        for count in range(1, 1200):
            pool.decode(request)
            if count > 2:  # what the prefill needed goes back a step later
                assert pool.held(request) == capacity.decoding_pages(prompt + count), f"{prompt} + {count} tokens"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens", [3000, 16_384, 61_440, 130_048])
def test_requests_that_fit_by_formula(settings: dict[str, Any], tokens: int) -> None:
    """The planned number of requests is admitted beside one another at their peaks, and no more."""
    pool = Pool(our_groups(STEP_TOKENS, **settings), POOL, STEP_TOKENS)
    num_blocks = pool.manager.block_pool.num_gpu_blocks
    capacity = planned(STEP_TOKENS, **settings).resolve(num_blocks)
    count = min(capacity.requests(num_blocks, tokens), 40)  # then the pool is cut to what 40 need
    peak = capacity.peak_decoding_pages(tokens)
    at_peak = next(length for length in range(tokens, 0, -1) if capacity.decoding_pages(length) == peak)

    def add_at_peak() -> None:
        assert pool.admit(at_peak - 5, wait=True)
        for _ in range(5):
            pool.decode(pool.running[-1])
        assert pool.held(pool.running[-1]) == peak

    while len(pool.running) < count - 1:
        add_at_peak()
    if count == 40:
        free = pool.manager.block_pool.get_num_free_blocks()
        pool.manager.block_pool.get_new_blocks(free - max(capacity.admission_pages(tokens), peak))
    assert pool.admit(tokens, wait=True)
    pool.manager.free(pool.running.pop())
    add_at_peak()
    assert not pool.admit(tokens, wait=True)
