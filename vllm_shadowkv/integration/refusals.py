"""What is refused at start-up: early, by name, with the way out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_shadowkv import extension
from vllm_shadowkv.config import OTHER_BACKEND, ShadowKVConfig
from vllm_shadowkv.integration.compat import check_vllm_version
from vllm_shadowkv.metrics import count_refusal, labels_of
from vllm_shadowkv.page import DTYPES
from vllm_shadowkv.plugin import CONNECTOR

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MLA = f"shadowkv does not support MLA models, whose keys are compressed already; {OTHER_BACKEND}."
OWN_BACKEND = (
    "shadowkv does not support models whose values are of another head size than their keys, for which vLLM takes a "
    "backend of its own; drop --attention-backend and --attention-config.backend_per_kind."
)
DRAFT_METHODS = ("ngram", "suffix", "draft_model")
MOST_CUDA_GROUP, MOST_CUDA_SLOTS = 16, 6144


def check_process() -> None:
    """Refuses a process that cannot run the backend at all.

    Raises:
        RuntimeError: another vLLM than the tested ones, or a platform or a GPU without kernels.
        ImportError: the compiled extension is missing or does not load.
    """
    check_vllm_version()
    compiled = extension.load()
    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise RuntimeError(
            f"shadowkv runs on CUDA and on the CPU, not on {current_platform.device_name}; {OTHER_BACKEND}."
        )
    if not compiled.has_cuda():
        raise RuntimeError(
            "shadowkv's extension was built without CUDA kernels; build it with CUDA_HOME set "
            "(`pip install --no-build-isolation .`), or use another --attention-backend."
        )
    # A worker knows its GPU; before there is one, vLLM asks the driver for the first.
    capability = torch.cuda.get_device_capability() if torch.cuda.is_initialized() else None
    capability = capability or current_platform.get_device_capability()
    if capability is None:
        return
    architectures, name = compiled.cuda_architectures(), f"{capability[0]}.{capability[1]}"
    if tuple(capability) < extension.LEAST_CAPABILITY:
        least = ".".join(map(str, extension.LEAST_CAPABILITY))
        raise RuntimeError(
            f"shadowkv needs a GPU of compute capability {least} or later, this one has {name}; {OTHER_BACKEND}."
        )
    if not extension.runs_on(tuple(capability), architectures):
        raise RuntimeError(
            f"shadowkv's CUDA kernels were built for {architectures}, this GPU has {name}; build them with "
            f"TORCH_CUDA_ARCH_LIST={name} (`pip install --no-build-isolation .`), or use another --attention-backend."
        )


def check_engine(vllm_config: VllmConfig, config: ShadowKVConfig) -> None:
    """Refuses engine settings that the backend does not work with.

    Raises:
        ValueError: the sentence names the setting and the way out.
    """
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
    own = str(model.dtype).removeprefix("torch.")
    # vLLM knows no KV cache of float32 by name.
    half = model.dtype in (torch.float16, torch.bfloat16)
    dtype_flags = f"--kv-cache-dtype {own}" if half else "--dtype bfloat16 --kv-cache-dtype bfloat16"
    refusals: list[tuple[Any, str]] = [
        (
            transfer is not None and transfer.kv_connector != CONNECTOR,
            "does not support KV connectors (--kv-transfer-config, --kv-offloading-size) but its own, because others "
            f"would move device pages without the values in the host pool; use {CONNECTOR}, or drop the connector",
        ),
        (
            transfer is not None and not cache.enable_prefix_caching,
            f"has {CONNECTOR} extend the prefix cache; drop --no-enable-prefix-caching, or --kv-transfer-config",
        ),
        (
            transfer is not None
            and cache.prefix_caching_hash_algo.startswith("xxhash")
            and "PYTHONHASHSEED" not in os.environ,
            f"has {CONNECTOR} find files by hashes that other processes must come to as well; use "
            "--prefix-caching-hash-algo sha256, or set PYTHONHASHSEED alike for all of them",
        ),
        (
            speculative is not None and speculative.method not in DRAFT_METHODS,
            f"verifies drafts of {', '.join(DRAFT_METHODS)}, not of {getattr(speculative, 'method', None)}; use one of "
            "those methods in --speculative-config",
        ),
        (
            speculative is not None and speculative.method == "draft_model" and vllm_config.use_v2_model_runner,
            "takes drafts of a draft model from vLLM's V1 runner only, because V2 plans both models' attention as one; "
            "set VLLM_USE_V2_MODEL_RUNNER=0, or use drafts of ngram",
        ),
        (
            speculative is not None and vllm_config.scheduler_config.async_scheduling,
            "must know how many drafts were accepted before it seals; add --no-async-scheduling to "
            "--speculative-config",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "does not support decode context parallelism; drop --decode-context-parallel-size",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "does not support prefill context parallelism; drop --prefill-context-parallel-size",
        ),
        (parallel.use_ubatching, "does not support dual batch overlap; drop --enable-dbo and --ubatch-size"),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True,
            "needs vLLM's hybrid KV cache manager; drop --disable-hybrid-kv-cache-manager",
        ),
        (
            model.is_mm_prefix_lm,
            "computes causal attention, and not that of image tokens that see each other both ways (is_mm_prefix_lm); "
            f"{OTHER_BACKEND}",
        ),
        (
            model.uses_mrope and model.supports_multimodal_inputs and config.key_codec != "none",
            "turns keys back by their place in the prompt, as M-RoPE has turned those of text and not those of images, "
            "which would lose too much; add --language-model-only, or set shadowkv.key_codec to none and "
            f"shadowkv.compression to 1, or {OTHER_BACKEND}",
        ),
        (
            vllm_config.attention_config.use_non_causal,
            f"computes causal attention only, and use_non_causal is set; {OTHER_BACKEND}",
        ),
        (
            model.rswa_window is not None,
            f"does not support a window over generated tokens (R-SWA, {model.rswa_window} tokens); {OTHER_BACKEND}",
        ),
        (
            speculative is not None and speculative.enable_adaptive_verification,
            "plans a step from the query lengths that the host knows; drop enable_adaptive_verification from "
            "--speculative-config",
        ),
        (envs.VLLM_BATCH_INVARIANT, "is not batch invariant; unset VLLM_BATCH_INVARIANT"),
        (
            cache.user_specified_block_size and cache.block_size != config.block_size,
            f"takes its block size from its own settings, not from --block-size {cache.block_size}; drop --block-size, "
            f"or set shadowkv.block_size in --additional-config (now {config.block_size})",
        ),
        (
            model.dtype not in DTYPES,
            f"supports float32, float16 and bfloat16, not --dtype {model.dtype}; use another --dtype",
        ),
        (
            cache.cache_dtype not in ("auto", own),
            f"stores keys and values in the model's dtype, {own}, not as {cache.cache_dtype}, which --kv-cache-dtype "
            f"or the checkpoint asks for; use {dtype_flags}",
        ),
    ]
    if current_platform.is_cuda():
        refusals += [
            (
                model.dtype == torch.float32,
                "computes in float16 or bfloat16 on CUDA, not in float32; use --dtype bfloat16",
            ),
            (
                not current_platform.is_pin_memory_available(),
                f"keeps values in pinned memory, which vLLM does not use here (WSL); {OTHER_BACKEND}, or try "
                "VLLM_WSL2_ENABLE_PIN_MEMORY=1",
            ),
        ]
    for wrong, sentence in refusals:
        if wrong:
            raise ValueError(f"shadowkv {sentence}.")


def check_cuda_shape(num_heads: int, num_kv_heads: int, slots: int) -> None:
    """Refuses what the CUDA kernels have no room for (csrc/cuda/select_chunks.cu, plan_slots.cu).

    Args:
        num_heads, num_kv_heads: of a layer, this rank's.
        slots: chunks per KV head in a request's slot pages.

    Raises:
        ValueError: the sentence names the limit and the way out.
    """
    if num_heads > MOST_CUDA_GROUP * num_kv_heads:
        raise ValueError(
            f"shadowkv's CUDA kernels take at most {MOST_CUDA_GROUP} query heads per KV head, this model has "
            f"{num_heads // num_kv_heads}; {OTHER_BACKEND} for this model."
        )
    if slots > MOST_CUDA_SLOTS:
        raise ValueError(
            f"shadowkv's CUDA kernels take at most {MOST_CUDA_SLOTS} slots per KV head, shadowkv.slot_chunks makes "
            f"{slots} in whole pages; lower shadowkv.slot_chunks."
        )


def check_layer(
    attn_type: str,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    kv_sharing_target_layer_name: str | None,
) -> None:
    """Refuses attention that the kernels do not compute.

    Raises:
        ValueError: the sentence names the feature and the way out.
    """
    for wrong, what in (
        (attn_type != "decoder", f"{str.__str__(attn_type)} attention"),
        (alibi_slopes is not None, "ALiBi"),
        (bool(logits_soft_cap), f"a logits soft cap ({logits_soft_cap})"),
        (kv_sharing_target_layer_name is not None, "a KV cache shared between layers"),
    ):
        if wrong:
            raise ValueError(f"shadowkv does not support layers with {what}; {OTHER_BACKEND} for this model.")


def check_served(num_layers: int, num_stages: int) -> None:
    """Refuses a model all of whose layers stay with vLLM's own backend (`left_layers.py`).

    Args:
        num_layers: our layers.
        num_stages: of a pipeline; one of several may have none.

    Raises:
        ValueError: the sentence names the ways out.
    """
    if not num_layers and num_stages == 1:
        raise ValueError(
            "shadowkv serves layers without a sliding window, and this model has none; "
            f"{OTHER_BACKEND}, or lower --max-model-len to the window."
        )


def check_connected(ours: bool, beside: bool) -> None:
    """Refuses our KV connector where the cache is not ours, or not ours alone.

    Args:
        ours: there are sealed blocks.
        beside: there are layers of other backends.

    Raises:
        ValueError: the sentence names the way out.
    """
    if not ours:
        raise ValueError(
            f"{CONNECTOR} moves sealed blocks of the shadowkv backend, and this engine has none; add "
            "--attention-backend shadowkv, or drop --kv-transfer-config."
        )
    if beside:
        raise ValueError(
            f"{CONNECTOR} moves sealed blocks alone, of which a model with layers of other backends beside (windows, "
            "chunks, states, a draft model) cannot make use; drop --kv-transfer-config."
        )


def check_chunks(vllm_config: VllmConfig) -> None:
    """Refuses prefix caching beside layers that attend in chunks, which vLLM's manager of such layers would meet later.

    Raises:
        ValueError: the sentence names the way out.
    """
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "shadowkv serves models with layers that attend in chunks without prefix caching only, because vLLM finds "
            "no prefixes in chunks beside pages of another block size; add --no-enable-prefix-caching, or "
            f"{OTHER_BACKEND}."
        )


def check_request(request: Any, vllm_config: VllmConfig) -> None:
    """Refuses a request that cannot be served, before it is scheduled.

    Raises:
        VLLMValidationError: its prompt comes in pieces, so it would grow after its exact pages were freed. Of this kind
            vLLM 0.33 tells the client the sentence; 0.32 logs it, and answers with an error without it.
    """
    if request.resumable:
        count_refusal(labels_of(vllm_config))
        raise VLLMValidationError(
            f"shadowkv does not support streaming input; send the whole prompt at once, or {OTHER_BACKEND}."
        )


def check_module(attention: Any) -> None:
    """Refuses what only an attention layer's module knows, and its implementation is not told.

    Raises:
        ValueError: it is of a class that attends in another way, or its values are of another head size than its keys.
    """
    if type(attention) is not Attention:
        raise ValueError(
            f"shadowkv does not support layers of vLLM's {type(attention).__name__}, which is not plain causal "
            f"attention; {OTHER_BACKEND} for this model."
        )
    if attention.head_size_v != attention.head_size:
        raise ValueError(OWN_BACKEND)


def check_positions(num_positions: int, max_model_len: int) -> None:
    """Refuses requests longer than the model's rotary table, which VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 lets vLLM accept.

    Sealing a block beyond the table would end the engine.

    Raises:
        ValueError: the sentence names both lengths.
    """
    if num_positions < max_model_len:
        raise ValueError(
            f"shadowkv turns keys by the model's rotary table, which has {num_positions} positions, fewer than "
            f"--max-model-len {max_model_len}; lower it to {num_positions}, or give the model a scaled RoPE with "
            "--hf-overrides."
        )
