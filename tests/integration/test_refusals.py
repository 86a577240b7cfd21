from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulation import vllm_config
from vllm.config import KVTransferConfig
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from vllm_shadowkv import extension
from vllm_shadowkv.config import ShadowKVConfig
from vllm_shadowkv.integration import compat, refusals, stored
from vllm_shadowkv.integration.attention import choice
from vllm_shadowkv.integration.model import other_layers
from vllm_shadowkv.integration.refusals import (
    check_connected,
    check_cuda_shape,
    check_engine,
    check_layer,
    check_module,
    check_process,
    check_served,
)
from vllm_shadowkv.integration.scheduler.stored_prefixes import StoredPrefixes
from vllm_shadowkv.integration.stored import Rank, open_store
from vllm_shadowkv.integration.worker import geometry, machine, memory, runtime
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.state import promised_memory
from vllm_shadowkv.state.block_store import BlockFolder
from vllm_shadowkv.state.host_memory import GIB
from vllm_shadowkv.state.promised_memory import promised_to_others

# -- The process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.33.0", "0.32.7", "0.32.0+cpu", "0.32.1rc1"])
def test_a_tested_vllm_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", version)
    compat.check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3.2", "0.320.0", "1.0", "dev"])
def test_another_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", version)
    monkeypatch.delenv(compat.ANY_VERSION, raising=False)  # `make vllm-check` sets it
    sentence = f"tested with vLLM 0.32.x, 0.33.x, this is {version}; install one of those, or set SHADOWKV_ANY_VLLM=1"
    with pytest.raises(RuntimeError, match=sentence.replace(".", r"\.")):
        compat.check_vllm_version()


@pytest.mark.parametrize("value", ["0", "", "yes"])
def test_only_1_overrides_the_version(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", "0.34.0")
    monkeypatch.setenv(compat.ANY_VERSION, value)
    with pytest.raises(RuntimeError, match="SHADOWKV_ANY_VLLM"):
        compat.check_vllm_version()


def test_an_untested_vllm_can_be_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat.vllm, "__version__", "0.34.0")
    monkeypatch.setenv(compat.ANY_VERSION, "1")
    compat.check_vllm_version()
    assert "not tested with vLLM 0.34.0; going on because SHADOWKV_ANY_VLLM=1" in caplog.text


def on(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    built_with_cuda: bool,
    capability: DeviceCapability | None = None,
    pinned: bool = True,
) -> None:
    platform = SimpleNamespace(
        is_cpu=lambda: device == "cpu",
        is_cuda=lambda: device == "cuda",
        device_name=device,
        get_device_capability=lambda: capability,
        is_pin_memory_available=lambda: pinned,
    )
    monkeypatch.setattr(refusals, "current_platform", platform)
    loaded = SimpleNamespace(has_cuda=lambda: built_with_cuda, cuda_architectures=lambda: "8.0;9.0")
    monkeypatch.setattr(extension, "load", lambda: loaded)


@pytest.mark.parametrize(("device", "built_with_cuda"), [("cpu", False), ("cpu", True), ("cuda", True)])
def test_a_platform_with_kernels_is_accepted(
    device: str, built_with_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, device, built_with_cuda)
    check_process()


def test_cuda_without_cuda_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cuda", built_with_cuda=False)
    with pytest.raises(RuntimeError, match=r"without CUDA kernels; build it with CUDA_HOME set .* or use another"):
        check_process()


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in (None, DeviceCapability(8, 9), DeviceCapability(9, 0)):
        on(monkeypatch, "cuda", built_with_cuda=True, capability=capability)
        check_process()
    on(monkeypatch, "cuda", built_with_cuda=True, capability=DeviceCapability(12, 0))
    sentence = (
        r"were built for 8\.0;9\.0, this GPU has 12\.0; build them with TORCH_CUDA_ARCH_LIST=12\.0 .* or use another"
    )
    with pytest.raises(RuntimeError, match=sentence):
        check_process()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.0 12.0+PTX", (12, 1), True),
        ("8.0;9.0+PTX", (11, 0), True),
        ("8.0;12.0+PTX", (11, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("Hopper", (9, 0), True),
    ],
)
def test_architectures_that_run(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert extension.runs_on(capability, architectures) == runs


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cuda", built_with_cuda=True, capability=DeviceCapability(7, 5))
    sentence = r"needs a GPU of compute capability 8\.0 or later, this one has 7\.5; use another --attention-backend"
    with pytest.raises(RuntimeError, match=sentence):
        check_process()


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "xpu", built_with_cuda=True)
    with pytest.raises(RuntimeError, match="runs on CUDA and on the CPU, not on xpu; use another --attention-backend"):
        check_process()


def test_a_missing_extension_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    with pytest.raises(ImportError, match=r"the compiled extension .* is missing; build it with"):
        check_process()


# -- The engine ------------------------------------------------------------------------------------------------------


def engine(**changes: Any) -> Any:
    """An engine's configuration with changes, named `section__field`; a plain name replaces a whole section."""
    real = vllm_config()
    names = (
        "kv_transfer_config",
        "speculative_config",
        "parallel_config",
        "cache_config",
        "scheduler_config",
        "attention_config",
        "model_config",
    )
    config = SimpleNamespace(**{name: copy.copy(getattr(real, name)) for name in names})
    config.cache_config.user_specified_block_size = False
    config.use_v2_model_runner = False
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            setattr(getattr(config, section), field, value)
        else:
            setattr(config, section, value)
    return config


def model(**changes: Any) -> Any:
    """What the checks read of a model's configuration."""
    usual = {"is_hybrid": False, "is_mm_prefix_lm": False, "rswa_window": None, "dtype": torch.bfloat16}
    usual |= {"uses_mrope": False, "supports_multimodal_inputs": False}
    return SimpleNamespace(**(usual | changes))


def drafts(method: str, adaptive: bool = False) -> Any:
    return SimpleNamespace(method=method, enable_adaptive_verification=adaptive)


def connector(name: str = "ShadowKVConnector", role: Any = "kv_both", **settings: Any) -> KVTransferConfig:
    return KVTransferConfig(kv_connector=name, kv_role=role, kv_connector_extra_config=settings)


ENGINES: list[tuple[dict[str, Any], str]] = [
    *(
        (
            {"kv_transfer_config": other},
            r"KV connectors \(--kv-transfer-config, --kv-offloading-size\) but its own, .*; use ShadowKVConnector, or "
            "drop the connector",
        )
        for other in (connector("OffloadingConnector"), connector("MultiConnector"), KVTransferConfig())
    ),
    (
        {"kv_transfer_config": connector(), "cache_config__enable_prefix_caching": False},
        "extend the prefix cache; drop --no-enable-prefix-caching, or --kv-transfer-config",
    ),
    (
        {"speculative_config": drafts("eagle3")},
        "of ngram, suffix, draft_model, not of eagle3; use one of those methods in --speculative-config",
    ),
    (
        {"speculative_config": drafts("draft_model"), "use_v2_model_runner": True},
        "from vLLM's V1 runner only, .*; set VLLM_USE_V2_MODEL_RUNNER=0, or use drafts of ngram",
    ),
    (
        {"speculative_config": drafts("ngram"), "scheduler_config__async_scheduling": True},
        "before it seals; add --no-async-scheduling to --speculative-config",
    ),
    ({"parallel_config__decode_context_parallel_size": 2}, "drop --decode-context-parallel-size"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "drop --prefill-context-parallel-size"),
    ({"parallel_config__enable_dbo": True}, "dual batch overlap; drop --enable-dbo and --ubatch-size"),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True},
        "needs vLLM's hybrid KV cache manager; drop --disable-hybrid-kv-cache-manager",
    ),
    (
        {"model_config": model(is_mm_prefix_lm=True)},
        r"image tokens that see each other both ways \(is_mm_prefix_lm\); use another --attention-backend",
    ),
    (
        {"model_config": model(uses_mrope=True, supports_multimodal_inputs=True)},
        "those of images, which would lose too much; add --language-model-only, or set shadowkv.key_codec to none and ",
    ),
    (
        {"model_config": model(rswa_window=64)},
        r"over generated tokens \(R-SWA, 64 tokens\); use another --attention-backend",
    ),
    ({"attention_config__use_non_causal": True}, "computes causal attention only, .*; use another --attention-backend"),
    (
        {"speculative_config": drafts("ngram", adaptive=True), "scheduler_config__async_scheduling": False},
        "drop enable_adaptive_verification from --speculative-config",
    ),
    (
        {"cache_config__user_specified_block_size": True, "cache_config__block_size": 16},
        r"not from --block-size 16; drop --block-size, or set shadowkv.block_size in --additional-config \(now 1024\)",
    ),
    (
        {"cache_config__cache_dtype": "fp8"},
        "in the model's dtype, bfloat16, not as fp8, .* or the checkpoint asks for; use --kv-cache-dtype bfloat16",
    ),
    ({"cache_config__cache_dtype": "fp8_e5m2"}, "not as fp8_e5m2, .*; use --kv-cache-dtype bfloat16"),
    ({"cache_config__cache_dtype": "float16"}, "not as float16, .*; use --kv-cache-dtype bfloat16"),
    (
        {"cache_config__cache_dtype": "fp8", "model_config": model(dtype=torch.float32)},
        "dtype, float32, not as fp8, .*; use --dtype bfloat16 --kv-cache-dtype bfloat16",
    ),
    ({"model_config__dtype": torch.float64}, "not --dtype torch.float64; use another --dtype"),
]


@pytest.mark.parametrize(("changes", "sentence"), ENGINES, ids=[", ".join(changes) for changes, _ in ENGINES])
def test_an_engine_that_cannot_work_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^shadowkv .*{sentence}") as caught:
        check_engine(engine(**changes), ShadowKVConfig())
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_config__cache_dtype": "bfloat16"},
        {"cache_config__user_specified_block_size": True, "cache_config__block_size": 1024},
        {"scheduler_config__disable_hybrid_kv_cache_manager": False},
        {"scheduler_config__async_scheduling": True},
        {"parallel_config__tensor_parallel_size": 2},
        {"kv_transfer_config": connector()},
        {"kv_transfer_config": connector(), "cache_config__prefix_caching_hash_algo": "sha256_cbor"},
        {"cache_config__enable_prefix_caching": False},
        {"model_config__dtype": torch.float32},
        {
            "speculative_config": drafts("ngram"),
            "scheduler_config__async_scheduling": False,
            "use_v2_model_runner": True,
        },
        {"speculative_config": drafts("draft_model"), "scheduler_config__async_scheduling": False},
    ],
    ids=lambda changes: ", ".join(changes) or "defaults",
)
def test_an_engine_that_works_is_accepted(changes: dict[str, Any]) -> None:
    check_engine(engine(**changes), ShadowKVConfig())


def test_hashes_that_no_other_process_comes_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    sentence = (
        "must come to as well; use --prefix-caching-hash-algo sha256, or set PYTHONHASHSEED alike for all of them"
    )
    for algorithm in ("xxhash", "xxhash_cbor"):
        with_ours = engine(kv_transfer_config=connector(), cache_config__prefix_caching_hash_algo=algorithm)
        with pytest.raises(ValueError, match=f"^shadowkv has ShadowKVConnector find files by hashes .*{sentence}"):
            check_engine(with_ours, ShadowKVConfig())
        check_engine(engine(cache_config__prefix_caching_hash_algo=algorithm), ShadowKVConfig())
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", "0")
            check_engine(with_ours, ShadowKVConfig())


def test_images_are_taken_where_keys_are_not_compressed() -> None:
    takes_images = engine(model_config=model(uses_mrope=True, supports_multimodal_inputs=True))
    check_engine(takes_images, ShadowKVConfig(key_codec="none", compression=1))
    check_engine(engine(model_config=model(uses_mrope=True)), ShadowKVConfig())
    check_engine(engine(model_config=model(supports_multimodal_inputs=True)), ShadowKVConfig())


def test_batch_invariance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match=r"^shadowkv is not batch invariant; unset VLLM_BATCH_INVARIANT\.$"):
        check_engine(engine(), ShadowKVConfig())


def test_float32_is_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cuda", built_with_cuda=True)
    with pytest.raises(
        ValueError, match=r"^shadowkv computes in float16 or bfloat16 on CUDA, .*; use --dtype bfloat16\.$"
    ):
        check_engine(engine(model_config__dtype=torch.float32), ShadowKVConfig())
    check_engine(engine(model_config__dtype=torch.float16), ShadowKVConfig())


def test_cuda_without_pinned_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cuda", built_with_cuda=True, pinned=False)
    with pytest.raises(ValueError, match=r"pinned memory, which vLLM does not use here \(WSL\); use another"):
        check_engine(engine(), ShadowKVConfig())


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((34, 2, 400), r"at most 16 query heads per KV head, this model has 17; use another --attention-backend"),
        (
            (32, 2, 6160),
            r"at most 6144 slots per KV head, shadowkv\.slot_chunks makes 6160 in whole pages; lower shadowkv\.slot_ch",
        ),
    ],
)
def test_shapes_beyond_the_cuda_kernels(shape: tuple[int, int, int], sentence: str) -> None:
    check_cuda_shape(32, 2, 6144)
    with pytest.raises(ValueError, match=f"^shadowkv's CUDA kernels take {sentence}"):
        check_cuda_shape(*shape)


# -- The layers ------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "attn_type": "decoder",
    "alibi_slopes": None,
    "logits_soft_cap": None,
    "kv_sharing_target_layer_name": None,
}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"attn_type": AttentionType.ENCODER}, "encoder attention"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, r"a logits soft cap \(50.0\)"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "a KV cache shared between layers"),
    ],
)
def test_attention_that_the_kernels_do_not_compute_is_refused(changes: dict[str, Any], what: str) -> None:
    sentence = f"^shadowkv does not support layers with {what}; use another --attention-backend for this model"
    with pytest.raises(ValueError, match=sentence):
        check_layer(**(PLAIN | changes))


def test_a_model_without_a_layer_of_ours_is_refused() -> None:
    check_served(1, num_stages=1)
    check_served(0, num_stages=2)
    with pytest.raises(ValueError, match=r"this model has none; use .*, or lower --max-model-len to the window\.$"):
        check_served(0, num_stages=1)


@pytest.mark.parametrize("changes", [{}, {"logits_soft_cap": 0.0}])
def test_plain_attention_is_accepted(changes: dict[str, Any]) -> None:
    check_layer(**(PLAIN | changes))


def module(cls: type[Attention] = Attention, head_size_v: int = 64) -> Any:
    """An attention module, as far as it is looked at."""
    made = cls.__new__(cls)
    made.__dict__.update(head_size=64, head_size_v=head_size_v)
    return made


def test_a_module_that_attends_in_its_own_way_is_refused() -> None:
    check_module(module())
    sentence = r"layers of vLLM's ChunkedLocalAttention, which is not plain causal attention; use another --attention-"
    with pytest.raises(ValueError, match=sentence):
        check_module(module(ChunkedLocalAttention))
    with pytest.raises(ValueError, match=r"values are of another head size than their keys, .*; drop --attention-"):
        check_module(module(head_size_v=32))


# -- The KV connector ------------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_ours_alone_has_no_connector() -> None:
    check_connected(ours=True, beside=False)
    for beside in (False, True):
        sentence = "this engine has none; add --attention-backend shadowkv, or drop --kv-transfer-config"
        with pytest.raises(ValueError, match=f"^ShadowKVConnector moves sealed blocks of .*{sentence}"):
            check_connected(ours=False, beside=beside)
    with pytest.raises(
        ValueError, match=r"^ShadowKVConnector moves sealed blocks alone, .*; drop --kv-transfer-config\.$"
    ):
        check_connected(ours=True, beside=True)


def open_at(path: Path, role: str = "kv_both") -> None:
    open_store(
        engine(kv_transfer_config=connector(role=role, path=str(path))), layout=[1], layers=["layers.0", "layers.1"]
    )


def opened(path: Path, patch: pytest.MonkeyPatch, role: str = "kv_both", **settings: Any) -> Path:
    """Where the files are."""
    rank = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True)
    patch.setattr(stored, "get_pp_group", lambda: rank)
    patch.setattr(stored, "get_tp_group", lambda: rank)
    config = vllm_config()
    with patch.context() as inner:
        inner.setattr(config, "kv_transfer_config", connector(role=role, path=str(path), **settings))
        inner.setattr(config.load_config, "load_format", "dummy")
        return Path(str(open_store(config, layout=[1], layers=["layers.0", "layers.1"])[1].folder))


def test_the_folder_of_the_files_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(tmp_path / "a" / "b", monkeypatch).parent == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == [], "what was tried is gone"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened(Path("~/c"), monkeypatch).parent == tmp_path / "c"
    assert (tmp_path / "c").is_dir()


def test_a_path_in_memory_takes_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [
        SimpleNamespace(mountpoint=mount, fstype=kind) for mount, kind in (("/", "ext4"), (str(tmp_path), "tmpfs"))
    ]
    monkeypatch.setattr(stored.psutil, "disk_partitions", lambda **_: mounts)
    with pytest.raises(ValueError, match=f"path {tmp_path}/a is in memory, .*; set max_gib beside path, and "):
        opened(tmp_path / "a", monkeypatch)
    assert opened(tmp_path / "a", monkeypatch, max_gib=1.0).parent == tmp_path / "a"


def test_a_path_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        for role in ("kv_both", "kv_consumer", "kv_producer"):
            with pytest.raises(ValueError, match=f"^ShadowKVConnector cannot use its path {path}: {why}; name another"):
                open_at(path, role)


def test_a_path_that_cannot_be_written_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """But to those that only read."""
    for role in ("kv_both", "kv_producer"):
        sentence = (
            r"^ShadowKVConnector cannot write to its path /proc: .*; name another, or set kv_role to kv_consumer\.$"
        )
        with pytest.raises(ValueError, match=sentence):
            open_at(Path("/proc"), role)
    assert opened(Path("/proc"), monkeypatch, "kv_consumer").parent == Path("/proc")


def open_ranks(*models: str) -> StoredPrefixes:
    """The scheduler's side, told of ranks with these models."""
    prefixes = StoredPrefixes.__new__(StoredPrefixes)
    folders = [BlockFolder(Path("/blocks"), {"model": model}) for model in models]
    prefixes.open([Rank(folder, f"pp0of1-tp{number}of2") for number, folder in enumerate(folders)])
    return prefixes


def test_ranks_that_disagree_are_refused() -> None:
    assert len(open_ranks("a", "a")._ranks) == 2
    sentence = (
        r"^ShadowKVConnector: the ranks of this engine have different models or settings \(pp0of1-tp0of2 in "
        r"/blocks/\w+, pp0of1-tp1of2 in /blocks/\w+\); start all of them with the same ones\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        open_ranks("a", "b")


# -- Host memory -----------------------------------------------------------------------------------------------------


class Workers:
    """vLLM's worker modules, replaced."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        class CPUWorker:
            def __init__(self, config: Any = None) -> None:
                self.vllm_config = config

            def determine_available_memory(self) -> int:
                """vLLM's own."""
                return 1000

        class Worker(CPUWorker):
            def determine_available_memory(self) -> int:
                return 2000

        self.cpu, self.gpu = CPUWorker, Worker
        patch.setitem(sys.modules, "vllm.v1.worker.cpu_worker", SimpleNamespace(CPUWorker=CPUWorker))  # type: ignore[arg-type]
        patch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
        patch.setattr(compat, "_bound", None)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def test_the_workers_memory_goes_through_the_bound(workers: Workers) -> None:
    compat.bound_kv_cache_memory(lambda worker, measure: measure() - worker.vllm_config)
    assert workers.cpu(1).determine_available_memory() == 999
    assert workers.gpu(2).determine_available_memory() == 1998
    assert workers.cpu.determine_available_memory.__doc__ == "vLLM's own."


def test_workers_are_patched_once_and_the_latest_bound_counts(workers: Workers) -> None:
    compat.bound_kv_cache_memory(lambda worker, measure: measure() - 1)
    patched = workers.cpu.determine_available_memory
    compat.bound_kv_cache_memory(lambda worker, measure: measure() - 5)
    assert workers.cpu.determine_available_memory is patched
    assert workers.cpu().determine_available_memory() == 995


def test_without_a_bound_vllms_number_stands(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    compat.bound_kv_cache_memory(lambda worker, measure: 0)
    monkeypatch.setattr(compat, "_bound", None)
    assert workers.cpu().determine_available_memory() == 1000


def test_a_worker_that_is_not_loaded_is_not_loaded_for_this(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.v1.worker.gpu_worker")
    compat.bound_kv_cache_memory(lambda worker, measure: 0)
    assert "vllm.v1.worker.gpu_worker" not in sys.modules
    assert workers.cpu().determine_available_memory() == 0


def runtime_of(patch: pytest.MonkeyPatch, **settings: Any) -> Runtime:
    """A worker's runtime with two layers of one KV head of 64, without a model, and 8 GiB of free host memory."""
    patch.setattr(runtime, "bound_kv_cache_memory", lambda bound: None)
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type="cpu")
    for module in (geometry, memory, machine):
        patch.setattr(module, "current_platform", platform)
    patch.setattr(choice, "of_platform", lambda layout, num_heads: None)
    patch.setattr(machine, "free_bytes", lambda: 8 * GIB)
    patch.setattr(machine, "promised_to_others", lambda server: 0)
    config = copy.copy(vllm_config())
    config.additional_config = {"shadowkv": settings}
    config.scheduler_config.async_scheduling = False
    config.scheduler_config.max_num_batched_tokens = 2048
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = config.model_config.original_max_model_len = 65_536
    made = Runtime(config)
    made.lay_out(num_heads=2, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    made.layers.by_name = dict.fromkeys(["layers.0", "layers.1"])  # type: ignore[arg-type]
    patch.setattr(Runtime, "_latest", weakref.ref(made))
    return made


@pytest.fixture
def make_runtime(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runtime]:
    return functools.partial(runtime_of, monkeypatch)


# -- Layers of other backends ----------------------------------------------------------------------------------------


LAYER = SimpleNamespace(num_kv_heads=1, head_size=64, kv_cache_torch_dtype=torch.bfloat16)


class Other(AttentionLayerBase):
    """A layer of the stock backend, with a sliding window of 4096 tokens."""

    def __init__(self, block_size: int = 128, head_size: int = 64) -> None:
        shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": head_size, "dtype": torch.bfloat16}
        self.spec = SlidingWindowSpec(block_size=block_size, sliding_window=4096, **shape)

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.spec


def beside(made: Runtime, *others: Other) -> Runtime:
    """The runtime with its two layers and others."""
    layers = {
        name: SimpleNamespace(
            exact=SimpleNamespace(layer_name=f"{name}.exact"), slots=SimpleNamespace(layer_name=f"{name}.slots")
        )
        for name in made.layers.by_name
    }
    made.layers.by_name = layers  # type: ignore[assignment]
    made.geometry.vllm_config.compilation_config = SimpleNamespace(
        static_forward_context={f"other.{number}": other for number, other in enumerate(others)}
    )
    return made


def test_pages_of_other_layers_are_counted(make_runtime: Callable[..., Runtime]) -> None:
    """Five layers in three groups of two, each with pages of 128 tokens like ours."""
    made = beside(make_runtime())
    alone = made.layers.spec_fields(LAYER)["boundary"].other_pages
    made = beside(make_runtime(), *[Other() for _ in range(5)])
    for _ in range(2):  # vLLM asks for specs more than once
        assert made.layers.spec_fields(LAYER)["boundary"] == made.geometry.boundary
    spec = Other().spec
    assert spec.page_size_bytes == made.geometry.layout.page_bytes
    pages = spec.max_memory_usage_bytes(made.geometry.vllm_config) // spec.page_size_bytes
    assert pages > 4096 // 128
    boundary = made.geometry.boundary
    assert boundary.other_pages == alone + 3 * pages
    assert made.memory.capacity.min_blocks == boundary.max_exact_pages + boundary.other_pages


def odd_pages(made: Runtime) -> Runtime:
    return beside(made, Other(block_size=48))


def test_pages_that_do_not_fit_are_refused(make_runtime: Callable[..., Runtime]) -> None:
    sentence = (
        r"pages of 32768 bytes are not a multiple of those of the other layers \(12288 bytes, 48 tokens\); set "
        r"shadowkv\.block_size and shadowkv\.compression so that block_size / compression \(now 128\) is a multiple of "
        r"48, or use another"
    )
    with pytest.raises(ValueError, match=sentence):
        odd_pages(make_runtime()).layers.spec_fields(LAYER)


def state(made: Runtime, kib: int) -> Runtime:
    """Beside a layer with a state of so many KiB."""
    other = Other()
    other.spec = MambaSpec(block_size=1024, shapes=((kib, 256),), dtypes=(torch.float32,))  # type: ignore[assignment]
    return beside(made, other)


def test_a_state_takes_a_page(make_runtime: Callable[..., Runtime]) -> None:
    alone = beside(make_runtime()).layers.spec_fields(LAYER)["boundary"].other_pages
    assert state(make_runtime(), 32).layers.spec_fields(LAYER)["boundary"].other_pages == alone + 1
    sentence = r"hold no state of the model's other layers \(33792 bytes\); set shadowkv.block_size to 2048, or lower"
    with pytest.raises(ValueError, match=sentence):
        state(make_runtime(), 33).layers.spec_fields(LAYER)


def test_a_group_without_all_layers_is_refused() -> None:
    other_layers.check_group(["layers.0", "layers.1"], 2)
    with pytest.raises(
        ValueError, match=r"its 2 layers in one KV cache group, vLLM makes groups of 1 because .* fewer; "
    ):
        other_layers.check_group(["layers.0"], 2)


def drafting(made: Runtime) -> Any:
    """The configuration that vLLM builds a draft model in."""
    config = copy.copy(made.geometry.vllm_config)
    config.model_config = SimpleNamespace()
    config.speculative_config = SimpleNamespace(
        uses_draft_model=lambda: True, draft_model_config=config.model_config, num_speculative_tokens=3
    )
    return config


def test_a_draft_model_is_not_served(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime()
    sentence = (
        "does not serve the draft model; name another backend for it, as attention_backend in --speculative-config"
    )
    with pytest.raises(ValueError, match=sentence):
        Runtime.of(drafting(made))


def test_pages_are_zeroed_for_layers_of_other_backends(make_runtime: Callable[..., Runtime]) -> None:
    """VLLM does so where dtypes differ."""
    made = beside(make_runtime())
    for layers_beside in False, True:
        made.geometry.layers_beside = layers_beside
        assert made.layers.spec_fields(LAYER)["dtype"] == (torch.uint8 if layers_beside else torch.bfloat16)
        assert made.geometry.pages_are_zeroed == layers_beside


def test_what_a_configuration_says_of_layers_of_other_backends(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime()
    config = copy.copy(made.geometry.vllm_config)
    assert not other_layers.may_have_layers_beside(config)
    assert other_layers.may_have_layers_beside(drafting(made))
    config.attention_config = SimpleNamespace(backend_per_kind={"full_attention": "SHADOWKV"})  # type: ignore[assignment]
    assert other_layers.may_have_layers_beside(config)


@pytest.mark.parametrize(
    ("fields", "stages", "beside"),
    [
        ({"sliding_window": 96}, 2, True),
        ({"attention_chunk_size": 8192}, 2, True),
        ({"sliding_window": None, "attention_chunk_size": 0}, 2, False),
        ({"sliding_window": 96}, 1, False),  # seen where layers are built
    ],
)
def test_all_stages_say_the_same_of_windows(
    fields: dict[str, Any], stages: int, beside: bool, make_runtime: Callable[..., Runtime]
) -> None:
    config = copy.copy(make_runtime().geometry.vllm_config)
    config.parallel_config = SimpleNamespace(pipeline_parallel_size=stages)  # type: ignore[assignment]
    config.model_config.hf_text_config = SimpleNamespace(**fields)  # type: ignore[assignment]
    assert other_layers.may_have_layers_beside(config) == beside


def test_the_pool_is_bounded_by_what_the_host_can_back(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime(host_memory_gib=1)
    row = 2 * made.geometry.layout.value_row_bytes
    page = 2 * made.geometry.layout.page_bytes
    assert made.memory.bound_bytes(1 << 50) == GIB // row * page
    assert made.memory.bound_bytes(1 << 20) == 1 << 20, "never more than vLLM has"


def test_fewer_blocks_are_said_in_the_log(
    make_runtime: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    made = make_runtime(host_memory_gib=1)
    blocks = GIB // (2 * made.geometry.layout.value_row_bytes)
    page = 2 * made.geometry.layout.page_bytes
    made.memory.bound_bytes(blocks * page)
    assert not caplog.records
    made.memory.bound_bytes((blocks + 100) * page)
    assert caplog.records[0].getMessage() == (
        f"shadowkv: {blocks} KV cache blocks instead of the {blocks + 100} that vLLM has room for: the values of more "
        "do not fit the host pool (shadowkv.host_memory_gib 1, shared by 1 rank(s)); raise shadowkv.host_memory_gib to "
        "have more."
    )


def test_an_override_beyond_what_the_host_can_back_is_refused_at_start_up(
    make_runtime: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    made = make_runtime(host_memory_gib=1)
    blocks = 8 * GIB // (2 * made.geometry.layout.value_row_bytes)
    made.geometry.vllm_config.cache_config = SimpleNamespace(num_gpu_blocks_override=blocks)
    made.memory.bound_bytes(1 << 50)
    assert not caplog.records, "vLLM takes that many, so there are not fewer"
    made.geometry.vllm_config.cache_config.num_gpu_blocks_override += 1
    with pytest.raises(MemoryError, match=rf"the values of {blocks + 1} KV cache blocks need 8\.0 GiB"):
        made.memory.bound_bytes(1 << 50)


def test_ranks_of_a_machine_share_its_memory(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime(host_memory_gib=1)
    alone = made.memory.bound_bytes(1 << 50)
    page = made.geometry.layout.page_bytes * 2
    parallel: Any = {"data_parallel_size": 2, "data_parallel_size_local": 2, "local_world_size": 2}
    for devices, use_ray, ranks in (
        (None, False, 2),
        ([0], False, 2),  # a user's choice of devices
        (None, True, 2),
        ([3], True, 1),  # two machines of Ray: local_world_size counts both
        ([1, 3], True, 2),
    ):
        made.geometry.vllm_config.parallel_config = SimpleNamespace(
            **parallel, use_ray=use_ray, assigned_physical_gpu_ids=devices
        )
        share = alone // (2 * ranks)
        assert share - page <= made.memory.bound_bytes(1 << 50) <= share


def test_what_other_servers_were_promised_is_left_to_them(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_runtime()
    alone = made.memory.bound_bytes(1 << 50, "ours")
    asked = []
    monkeypatch.setattr(machine, "promised_to_others", lambda server: asked.append(server) or 4 * GIB)
    with caplog.at_level("INFO"):
        beside = made.memory.bound_bytes(1 << 50, "ours")
    assert asked == ["ours"]
    assert alone // 2 - made.geometry.layout.page_bytes * 2 <= beside <= alone // 2
    assert "shadowkv: 4.0 GiB of the free host memory are left to other servers of this machine" in caplog.text
    monkeypatch.setattr(machine, "promised_to_others", lambda server: 9 * GIB)
    with pytest.raises(ValueError, match=r"backs 0 KV cache blocks \(85% of the 0\.0 GiB of host memory that are free"):
        made.memory.bound_bytes(1 << 50, "ours")


def test_this_server_is_told_of_to_others_while_it_lives(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(promised_memory, "FOLDER", tmp_path)
    made = make_runtime()
    bound = made.memory.bound_bytes(1 << 50, "ours")
    row, page = made.geometry.layout.value_row_bytes, made.geometry.layout.page_bytes
    assert promised_to_others("ours") == 0
    assert promised_to_others() == pytest.approx(bound // page * row, rel=0.02), "the host pool"
    made.memory._promise = None
    assert promised_to_others() == 0


def test_a_host_too_small_for_one_request_is_refused(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime(host_memory_gib=0.01)
    needed = made.geometry.boundary.other_pages + made.geometry.boundary.max_exact_pages
    assert needed > 64 + made.geometry.slot_pages_per_request
    sentence = (
        rf"shadowkv: host memory backs 77 KV cache blocks \(shadowkv.host_memory_gib 0\.01\), one request of 65536 "
        rf"token\(s\) needs {needed} \(0\.\d+ GiB\); raise shadowkv\.host_memory_gib, or lower --max-model-len\."
    )
    with pytest.raises(ValueError, match=sentence):
        made.memory.bound_bytes(1 << 50)


def test_a_length_that_vllm_fits_is_not_refused(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime(host_memory_gib=0.01)
    made.geometry.vllm_config.model_config.original_max_model_len = -1
    page = made.geometry.layout.page_bytes * 2
    assert made.memory.bound_bytes(1 << 50) == 77 * page
    fitted = made.geometry.boundary.fit(77)
    assert 0 < fitted.max_model_len < 65_536
    tight = make_runtime(host_memory_gib=0.001)
    tight.geometry.vllm_config.model_config.original_max_model_len = -1
    sentence = r"one request of 1 token\(s\) needs \d+ \(0\.0\d+ GiB\); raise shadowkv\.host_memory_gib\.$"
    with pytest.raises(ValueError, match=sentence):
        tight.memory.bound_bytes(1 << 50)


def test_only_our_engines_are_bounded_and_probed(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, probed = make_runtime(host_memory_gib=1), []
    monkeypatch.setattr(runtime, "probe", lambda *arguments: probed.append(arguments))
    worker = SimpleNamespace(vllm_config=made.geometry.vllm_config)
    ours = runtime._measured_bytes(worker, lambda: 1 << 50)
    assert probed == [(worker, made.layers)]
    assert ours == made.memory.bound_bytes(1 << 50) < 1 << 50
    other = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}), instance_id="theirs")
    assert runtime._measured_bytes(SimpleNamespace(vllm_config=other), lambda: 1 << 50) == 1 << 50
    assert len(probed) == 1


def test_data_parallel_engines_of_ray_are_one_server(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM adds an ending to the id of each."""
    made = make_runtime()
    servers = []
    monkeypatch.setattr(machine, "promised_to_others", lambda server: servers.append(server) or 0)
    monkeypatch.setattr(runtime, "probe", lambda *arguments: None)
    config = copy.copy(made.geometry.vllm_config)
    for config.instance_id in ("0a1b2", "0a1b2_dp0", "0a1b2_dp11"):
        runtime._measured_bytes(SimpleNamespace(vllm_config=config), lambda: 1 << 30)
    assert servers == ["0a1b2"] * 3


def test_requests_beyond_the_rotary_table_are_refused_at_start_up() -> None:
    refusals.check_positions(4096, 4096)
    sentence = r"has 4096 positions, fewer than --max-model-len 8192; lower it to 4096, or give the model a scaled RoPE"
    with pytest.raises(ValueError, match=sentence):
        refusals.check_positions(4096, 8192)


def test_small_pieces_of_prompts_are_warned_of_on_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy.copy(vllm_config())
    config.scheduler_config = copy.copy(config.scheduler_config)
    for device, piece, warned in (("cuda", 64, True), ("cuda", 1024, False), ("cuda", 0, False), ("cpu", 64, False)):
        caplog.clear()
        on(monkeypatch, device, built_with_cuda=True)
        monkeypatch.setattr(geometry, "current_platform", refusals.current_platform)
        config.scheduler_config.long_prefill_token_threshold = piece
        geometry.Geometry(config)
        assert (f"threshold {piece} computes prompts in small pieces" in caplog.text) == warned
        assert not warned or caplog.text.rstrip().endswith("set it to 1024 or more.")


def test_layers_must_be_equal(make_runtime: Callable[..., Runtime]) -> None:
    made = make_runtime()
    made.lay_out(num_heads=2, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs equal attention layers, got .* \(4, 1, 64, torch.bfloat16\) after"):
        made.lay_out(num_heads=4, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
