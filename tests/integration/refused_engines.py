"""Refusals of what a process, its settings or its engine are, with a model that is served.

Not here, because vLLM answers first on a CPU; `test_refusals.py` has them: prefill context parallelism (its V1 runner
refuses it, and V2 asks for a GPU per rank), adaptive verification (it wants CUDA graphs). Drafts on the GPU
(`ngram_gpu`) fail in vLLM for want of pinned memory; Medusa stands for the methods that are refused.
"""

from __future__ import annotations

from refusal_cases import (
    DRAFT,
    LLAMA,
    NO_CONNECTOR,
    ONE_KIND,
    OTHER,
    Case,
    Change,
    case,
    connector,
    drafts,
    options,
    ours,
    value,
)

from vllm_shadowkv.extension import LIBRARY

NGRAM = {"draft": None} | options(**drafts("ngram", prompt_lookup_max=3))
MEDUSA = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": 2, "num_hidden_layers": 1}
MANY_BLOCKS, FEWER_BLOCKS = {"num_gpu_blocks_override": 10_000_000}, options(num_gpu_blocks_override=500)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8192}

BFLOAT16 = options(kv_cache_dtype="bfloat16")
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
COMPRESSED_TENSORS = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "quantization_status": "compressed",
        "kv_cache_scheme": FP8,
    }
}
MODELOPT = {
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["*"],
        "kv_cache_quant_algo": "FP8",
    }
}

OTHER_CONNECTOR = (
    "does not support KV connectors (--kv-transfer-config, --kv-offloading-size) but its own, because others would "
    "move device pages without the values in the host pool; use ShadowKVConnector, or drop the connector"
)
OF_CONNECTOR = "ValueError: --kv-transfer-config kv_connector_extra_config of ShadowKVConnector: {}."
EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
OWN_DTYPE = (
    "stores keys and values in the model's dtype, {}, not as {}, which --kv-cache-dtype or the checkpoint asks for; "
    "use {}"
)
FP8_ASKED = OWN_DTYPE.format("bfloat16", "fp8…", "--kv-cache-dtype bfloat16")
NO_ROOM = (
    "MemoryError: shadowkv: the {} of 10000000 KV cache blocks need … GiB of host memory (… bytes), … GiB (… bytes) "
    "are free; lower --num-gpu-blocks-override, --kv-cache-memory-bytes or shadowkv.host_memory_gib."
)

SETTINGS: list[tuple[Change, str, Change]] = [
    ({"compression": 3}, "'compression': input should be 1, 2, 4, 8 or 16, got 3", {"compression": 4}),
    ({"block_size": 1000}, "block_size must be a positive multiple of 64, got 1000", {"block_size": 1024}),
    (
        {"block_size": 64, "compression": 8},
        "block_size / compression must be a multiple of 16, got 64 / 8",
        {"block_size": 64, "compression": 1},
    ),
    ({"rank": 100}, "rank must be a multiple of 16, got 100", {"rank": 96}),
    ({"sparse_budget": 1001}, "sparse_budget must be a multiple of chunk_size 8, got 1001", {"sparse_budget": 1000}),
    (
        {"num_outlier_chunks": 129},
        "num_outlier_chunks must be at most the 128 chunks of a block, got 129",
        {"num_outlier_chunks": 2},
    ),
    (
        {"slot_chunks": 260},
        "slot_chunks must be at least 261 for a sparse_budget of 2048 tokens, got 260",
        {"slot_chunks": 261},
    ),
]
ENGINES: list[Case] = [
    # The process.
    case(
        "version",
        "RuntimeError: shadowkv is tested with vLLM 0.32.x, 0.33.x, this is 0.34.0; install one of those, or set "
        "SHADOWKV_ANY_VLLM=1 to go on untested.",
        {"environment": {"SHADOWKV_ANY_VLLM": "1"}},
        {"instead": {"vllm.__version__": "0.33.0"}},
        instead={"vllm.__version__": "0.34.0"},
    ),
    case(
        "extension",
        "ImportError: the compiled extension /nowhere/_C.abi3.so is missing; build it with `make install` or `pip "
        "install --no-build-isolation -e .`.",
        {"instead": {"vllm_shadowkv.extension.LIBRARY": str(LIBRARY)}},
        on="cpu",
        instead={"vllm_shadowkv.extension.LIBRARY": "/nowhere/_C.abi3.so"},
    ),
    case(
        "no kernels for a GPU",
        "RuntimeError: shadowkv's extension was built without CUDA kernels; build it with CUDA_HOME set (`pip install "
        "--no-build-isolation .`), or use another --attention-backend.",
        {"architectures": "9.0"},
        OTHER,
        on="cuda",
        architectures="",
    ),
    case(
        "no kernels for this GPU",
        "RuntimeError: shadowkv's CUDA kernels were built for 8.0;9.0, this GPU has 12.0; build them with "
        "TORCH_CUDA_ARCH_LIST=12.0 (`pip install --no-build-isolation .`), or use another --attention-backend.",
        {"architectures": "12.0"},
        OTHER,
        on="cuda",
        capability=(12, 0),
    ),
    case(
        "old GPU",
        "RuntimeError: shadowkv needs a GPU of compute capability 8.0 or later, this one has 7.5; use another "
        "--attention-backend.",
        on="cuda",
        capability=(7, 5),
    ),
    value(
        "no pinned memory",
        "keeps values in pinned memory, which vLLM does not use here (WSL); use another --attention-backend, or try "
        "VLLM_WSL2_ENABLE_PIN_MEMORY=1",
        OTHER,
        {"environment": {"VLLM_WSL2_ENABLE_PIN_MEMORY": "1"}},
        on="cuda",
        wsl=True,
    ),
    case(
        "no attention library",
        "RuntimeError: shadowkv computes prefills with vLLM's FlashAttention, or xformers where that does not run, and "
        "here neither does (…); pip install 'vllm-shadowkv[xformers]', or use another --attention-backend.",
        {"library": "xformers"},
        OTHER,
        on="cuda",
        library="neither",
    ),
    case(
        "xformers without kernels",
        "RuntimeError: shadowkv computes prefills with vLLM's FlashAttention or with xformers, and neither does heads "
        "of 64 in torch.bfloat16 here (python -m xformers.info); use another --attention-backend.",
        on="cuda",
        library="xformers without kernels",
    ),
    case(
        "instruction set",
        "RuntimeError: SHADOWKV_CPU_ISA must be baseline, avx2 or avx512, got 'amx'",
        {"environment": {"SHADOWKV_CPU_ISA": "baseline"}},
        on="cpu",
        environment={"SHADOWKV_CPU_ISA": "amx"},
    ),
    # The settings.
    *(
        case(
            "setting " + ", ".join(wrong),
            f"ValueError: --additional-config shadowkv: {says}.",
            options(**ours(**right)),
            on="cpu",
            options=ours(**wrong),
        )
        for wrong, says, right in SETTINGS
    ),
    case(
        "settings of another type",
        "ValueError: --additional-config: 'shadowkv' must be an object like {\"sparse_budget\": 2048}, got list.",
        options(**ours(sparse_budget=2048)),
        on="cpu",
        options={"additional_config": {"shadowkv": [2048]}},
    ),
    case(
        "unknown setting",
        "ValueError: --additional-config shadowkv: unknown key 'sparse_budgets' (known: …, sparse_budget, …).",
        options(**ours(sparse_budget=1024)),
        options=ours(sparse_budgets=1024),
        quick=True,
    ),
    case(
        "page too small",
        "ValueError: shadowkv: keys of rank 16, landmarks and outliers of a block of 256 tokens do not fit a page of "
        "8192 bytes (2 KV heads of 64); lower compression (16) or num_outlier_chunks (1).",
        options(**ours(block_size=256, compression=4)),
        options=ours(block_size=256, compression=16),
    ),
    case(
        "too many slots",
        "ValueError: shadowkv's CUDA kernels take at most 6144 slots per KV head, shadowkv.slot_chunks makes 6150 in "
        "whole pages; lower shadowkv.slot_chunks.",
        options(**ours(slot_chunks=6000)),
        on="cuda",
        options=ours(slot_chunks=6144),
    ),
    # The engine.
    value(
        "other connector",
        OTHER_CONNECTOR,
        options(**connector()),
        options(**NO_CONNECTOR),
        options={"kv_transfer_config": EXAMPLE},
    ),
    value(
        "offloading",
        OTHER_CONNECTOR,
        options(kv_offloading_size=None, **connector()),
        options(kv_offloading_size=None),
        options={"kv_offloading_size": 1},
    ),
    value(
        "connector without prefixes",
        "has ShadowKVConnector extend the prefix cache; drop --no-enable-prefix-caching, or --kv-transfer-config",
        options(enable_prefix_caching=None),
        options(**NO_CONNECTOR),
        options=connector() | {"enable_prefix_caching": False},
    ),
    # That PYTHONHASHSEED leads out is tried in `test_refusals.py`: xxhash is not installed.
    value(
        "connector by random hashes",
        "has ShadowKVConnector find files by hashes that other processes must come to as well; use "
        "--prefix-caching-hash-algo sha256, or set PYTHONHASHSEED alike for all of them",
        options(prefix_caching_hash_algo="sha256"),
        options=connector() | {"prefix_caching_hash_algo": "xxhash"},
    ),
    case(
        "connector of another backend",
        "ValueError: ShadowKVConnector moves sealed blocks of the shadowkv backend, and this engine has none; add "
        "--attention-backend shadowkv, or drop --kv-transfer-config.",
        options(attention_backend="shadowkv"),
        options(**NO_CONNECTOR),
        options=connector() | {"attention_backend": None},
    ),
    case(
        "connector without a path",
        OF_CONNECTOR.format("'path' is missing"),
        options(**connector()),
        on="cpu",
        options=connector(path=None),
    ),
    case(
        "unknown setting of the connector",
        OF_CONNECTOR.format("unknown key 'max_gb' (known: path, max_gib)"),
        options(**connector(max_gib=1)),
        on="cpu",
        options=connector(max_gb=1),
    ),
    case(
        "connector in a file",
        "ValueError: ShadowKVConnector cannot use its path …/config.json: File exists; name another.",
        options(**connector()),
        quick=True,
        options=connector(path="{folder}/config.json"),
    ),
    case(
        "connector below a file",
        "ValueError: ShadowKVConnector cannot use its path …/config.json/blocks: Not a directory; name another.",
        options(**connector()),
        on="cpu",
        options=connector(path="{folder}/config.json/blocks"),
    ),
    case(
        "connector where nothing can be written",
        "ValueError: ShadowKVConnector cannot write to its path /proc: No such file or directory; name another, or set "
        "kv_role to kv_consumer.",
        options(**connector()),
        options(**connector("kv_consumer", path="/proc")),
        on="cpu",
        options=connector(path="/proc"),
    ),
    case(
        "connector in memory",
        "ValueError: ShadowKVConnector's path /dev/shm is in memory, of which the host pool takes most; set max_gib "
        "beside path, and shadowkv.host_memory_gib so that both fit.",
        options(**connector("kv_consumer", path="/dev/shm", max_gib=1) | ours(host_memory_gib=0.1)),
        on="cpu",
        options=connector("kv_consumer", path="/dev/shm"),
    ),
    value(
        "other drafts",
        "verifies drafts of ngram, suffix, draft_model, not of medusa; use one of those methods in "
        "--speculative-config",
        NGRAM | {"draft": None},
        options(**DRAFT, async_scheduling=False) | {"draft": LLAMA | {"num_hidden_layers": 2}},
        draft=MEDUSA,
        options=drafts("medusa"),
    ),
    value(
        "drafts by ours",
        "does not serve the draft model; name another backend for it, as attention_backend in --speculative-config",
        options(**DRAFT),
        draft=LLAMA,
        options=drafts("draft_model", attention_backend="SHADOWKV") | {"async_scheduling": False},
    ),
    value(
        "asynchronous drafts",
        "must know how many drafts were accepted before it seals; add --no-async-scheduling to --speculative-config",
        options(async_scheduling=False),
        on="cuda",
        draft=LLAMA,
        options=DRAFT,
    ),
    value(
        "drafts on V2",
        "takes drafts of a draft model from vLLM's V1 runner only, because V2 plans both models' attention as one; set "
        "VLLM_USE_V2_MODEL_RUNNER=0, or use drafts of ngram",
        {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
        NGRAM | {"draft": None},
        draft=LLAMA,
        options=DRAFT | {"async_scheduling": False},
        runner="v2",
    ),
    value(
        "dual batch overlap",
        "does not support dual batch overlap; drop --enable-dbo and --ubatch-size",
        options(ubatch_size=None),
        options={"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
    ),
    value(
        "no hybrid manager",
        "needs vLLM's hybrid KV cache manager; drop --disable-hybrid-kv-cache-manager",
        options(disable_hybrid_kv_cache_manager=None),
        options={"disable_hybrid_kv_cache_manager": True},
    ),
    value(
        "image tokens",
        "computes causal attention, and not that of image tokens that see each other both ways (is_mm_prefix_lm); use "
        "another --attention-backend",
        options={"hf_overrides": {"is_mm_prefix_lm": True}},
    ),
    value(
        "not causal",
        "computes causal attention only, and use_non_causal is set; use another --attention-backend",
        options(attention_config={"use_non_causal": True}),
        options={"attention_backend": None, "attention_config": {"use_non_causal": True, "backend": "SHADOWKV"}},
    ),
    value(
        "R-SWA",
        "does not support a window over generated tokens (R-SWA, 64 tokens); use another --attention-backend",
        options={"hf_overrides": {"rswa_window": 64}},
    ),
    value(
        "batch invariance",
        "is not batch invariant; unset VLLM_BATCH_INVARIANT",
        {"environment": {"VLLM_BATCH_INVARIANT": "0"}},
        environment={"VLLM_BATCH_INVARIANT": "1"},
    ),
    value(
        "block size",
        "takes its block size from its own settings, not from --block-size 512; drop --block-size, or set "
        "shadowkv.block_size in --additional-config (now 1024)",
        options(block_size=None),
        options(**ours(block_size=512)),
        options={"block_size": 512},
    ),
    value("fp8", FP8_ASKED, BFLOAT16, options={"kv_cache_dtype": "fp8"}),
    value("compressed-tensors", FP8_ASKED, BFLOAT16, model=COMPRESSED_TENSORS, weights="scales"),
    value("ModelOpt", FP8_ASKED, BFLOAT16, model=MODELOPT, weights="scales"),
    value(
        "fp8 beside float32",
        OWN_DTYPE.format("float32", "fp8", "--dtype bfloat16 --kv-cache-dtype bfloat16"),
        options(dtype="bfloat16", kv_cache_dtype="bfloat16"),
        options={"dtype": "float32", "kv_cache_dtype": "fp8"},
    ),
    value(
        "float64",
        "supports float32, float16 and bfloat16, not --dtype torch.float64; use another --dtype",
        options(dtype="bfloat16"),
        options={"dtype": "torch.float64"},
    ),
    value(
        "float32 on CUDA",
        "computes in float16 or bfloat16 on CUDA, not in float32; use --dtype bfloat16",
        options(dtype="bfloat16"),
        options(dtype="float16"),
        on="cuda",
        options={"dtype": "float32"},
    ),
    value(
        "beyond the rotary table",
        "turns keys by the model's rotary table, which has 8192 positions, fewer than --max-model-len 16384; lower it "
        "to 8192, or give the model a scaled RoPE with --hf-overrides",
        options(max_model_len=8192),
        options(hf_overrides={"rope_parameters": YARN}),
        environment={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        options={"max_model_len": 16384},
    ),
    value(
        "one kind on the CPU",
        "cannot be asked for one kind of layers on the CPU, whose platform has one backend for all; use "
        "--attention-backend shadowkv, which leaves layers with windows to vLLM's own, in place of "
        "--attention-config.backend_per_kind",
        options(attention_config=None, attention_backend="shadowkv"),
        on="cpu",
        options=ONE_KIND,
    ),
    # Host memory.
    case(
        "small host pool",
        "ValueError: shadowkv: host memory backs 77 KV cache blocks (shadowkv.host_memory_gib 0.02), one request of "
        "8192 token(s) needs … (… GiB); raise shadowkv.host_memory_gib, or lower --max-model-len.",
        options(**ours(host_memory_gib=0.1)),
        options(max_model_len=1024),
        options=ours(host_memory_gib=0.02) | {"max_model_len": 8192},
    ),
    case(
        "host pool for no length",
        "ValueError: shadowkv: host memory backs 0 KV cache blocks (shadowkv.host_memory_gib 0.0001), one request of 1 "
        "token(s) needs … (… GiB); raise shadowkv.host_memory_gib.",
        options(**ours(host_memory_gib=0.02)),
        options=ours(host_memory_gib=0.0001) | {"max_model_len": -1},
    ),
    case(
        "large host pool",
        "ValueError: shadowkv: host_memory_gib asks for 100000 GiB, but … GiB of host memory are free; lower "
        "host_memory_gib, or leave it out to take most of what is free.",
        options(**ours(host_memory_gib=0.1)),
        options(additional_config=None),
        options=ours(host_memory_gib=100_000),
    ),
    case("many blocks", NO_ROOM.format("values and pages"), FEWER_BLOCKS, on="cpu", options=MANY_BLOCKS),
    case("many blocks", NO_ROOM.format("values"), FEWER_BLOCKS, on="cuda", options=MANY_BLOCKS),
]
