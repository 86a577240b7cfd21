from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulation import write_tiny_llama
from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig, _cached_get_attn_backend, get_attn_backend

from vllm_shadowkv.integration import platform
from vllm_shadowkv.integration.backend import ShadowKVBackend
from vllm_shadowkv.integration.pseudo_layers import ExactGroupBackend, SlotGroupBackend
from vllm_shadowkv.plugin import BACKEND, NAME, register

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="about vLLM's CPU platform")


def python(code: str, **environment: str) -> list[str]:
    """What the code prints after "said", in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.removeprefix("said ") for line in result.stdout.splitlines() if line.startswith("said ")]


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


# -- The name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SHADOWKV", "shadowkv", "ShadowKV"])
def test_any_case_of_the_name(name: str) -> None:
    assert AttentionConfig(backend=name).backend is AttentionBackendEnum[NAME]  # type: ignore[arg-type]


def test_the_member_names_the_backend() -> None:
    member = AttentionBackendEnum[NAME]
    assert member.get_path() == BACKEND
    assert member.get_class() is ShadowKVBackend
    # vLLM looks the member up by what the backend, and a pseudo-layer's backend, calls itself.
    assert {backend.get_name() for backend in (ShadowKVBackend, ExactGroupBackend, SlotGroupBackend)} == {member.name}


def test_registering_again_changes_nothing() -> None:
    members, overrides = list(AttentionBackendEnum), dict(registry._ATTN_OVERRIDES)
    register()
    register()
    assert list(AttentionBackendEnum) == members
    assert overrides == registry._ATTN_OVERRIDES


# -- Processes -------------------------------------------------------------------------------------------------------

SPAWN = """
import multiprocessing, os, sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum

def child(member, queue):
    from vllm_shadowkv.exposition import owners
    queue.put((member is AttentionBackendEnum["SHADOWKV"], member.get_path(), owners))

if __name__ == "__main__":
    import copy
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm_shadowkv.exposition import belong_to
    belong_to(None, 7)
    member = AttentionBackendEnum["SHADOWKV"]
    assert copy.deepcopy(member) is member
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(member, queue))
    process.start()
    process.join()
    assert process.exitcode == 0, "the child could not unpickle its arguments"
    same, path, owners = queue.get(timeout=10)
    print("said", same, path, owners == {7, os.getpid()})
"""


def test_vllm_loads_the_plugin_and_a_spawned_process_unpickles_the_member_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As vLLM's engine core does with its configuration. Spawning needs a file to import.
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    said = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert said == [f"True {BACKEND} True"]


TOUCH = """
import sys
import vllm.plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
import prometheus_client.core, prometheus_client.parser, psutil, torch  # vLLM's own processes import them anyway
register_backend(AttentionBackendEnum.CPU_ATTN, "their.Backend")
before = set(sys.modules)
def forbidden(*arguments, **options):
    raise AssertionError("touched")
torch.cuda._lazy_init = torch.ops.load_library = forbidden
import vllm_shadowkv.plugin
vllm_shadowkv.plugin.platform()
print("said", *sorted(name for name in set(sys.modules) - before))
import vllm.distributed.kv_transfer.kv_connector.factory
before = set(sys.modules)
vllm_shadowkv.plugin.register()
vllm_shadowkv.plugin.register()
print("said", len(set(sys.modules) - before))
print("said", torch.cuda.is_initialized(), hasattr(torch.ops.shadowkv, "cpu_isa"))
print("said", AttentionBackendEnum.CPU_ATTN.get_path(), AttentionBackendEnum.CPU_MLA.get_path())
"""


def test_registering_imports_nothing_and_touches_nothing() -> None:
    """But for vLLM's factory of connectors, which is imported where general plugins are loaded."""
    imported, afterwards, touched, overrides = python(TOUCH, VLLM_PLUGINS="")
    assert afterwards == "0"
    assert imported.split() == ["vllm_shadowkv", "vllm_shadowkv.exposition", "vllm_shadowkv.plugin"]
    assert touched == "False False"
    assert overrides == "their.Backend vllm_shadowkv.integration.platform.CPU_MLA", "another plugin's override stays"


DICTIONARY = """
from vllm import LLM  # nothing has loaded general plugins
from vllm.config import AttentionConfig
for asked in {"backend": "SHADOWKV"}, {"backend": "shadowkv"}, {"backend_per_kind": {"full_attention": "SHADOWKV"}}:
    config = AttentionConfig(**asked)
    print("said", config.backend or config.backend_per_kind["full_attention"])
"""


def test_a_dictionary_may_name_the_backend_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM(attention_config={...})` is validated before vLLM loads general plugins."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert python(DICTIONARY) == ["AttentionBackendEnum.SHADOWKV"] * 3


# -- The choice on the CPU -------------------------------------------------------------------------------------------


def chosen(backend: str | None, **asked: Any) -> Any:
    config = VllmConfig(attention_config=AttentionConfig(backend=backend))  # type: ignore[arg-type]
    with set_current_vllm_config(config):
        return get_attn_backend(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", **asked)


@pytest.fixture
def _fresh_choice() -> None:
    _cached_get_attn_backend.cache_clear()


@on_cpu
@pytest.mark.usefixtures("_fresh_choice")
def test_the_cpu_platform_gives_what_was_asked_for() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert chosen("shadowkv") is ShadowKVBackend
    assert chosen(None) is CPUAttentionBackend
    assert chosen("CPU_ATTN") is CPUAttentionBackend


@on_cpu
@pytest.mark.usefixtures("_fresh_choice")
def test_mla_on_the_cpu_is_refused_where_selected_and_stock_otherwise() -> None:
    with pytest.raises(ValueError, match=r"shadowkv does not support MLA models, .*; use another --attention-backend"):
        chosen("shadowkv", use_mla=True)
    assert chosen(None, use_mla=True).is_mla()


@pytest.mark.parametrize("name", ["FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"])
def test_a_backend_that_a_model_chooses_in_place_of_ours_is_refused(name: str) -> None:
    """MiMo-V2, whose values have another head size than its keys, would run it in silence."""
    for asked in ({"backend": "shadowkv"}, {"backend_per_kind": {"full_attention": "SHADOWKV"}}):
        config = VllmConfig(attention_config=AttentionConfig(**asked))  # type: ignore[arg-type]
        with (
            set_current_vllm_config(config),
            pytest.raises(ValueError, match=r"another head size .*; drop --attention"),
        ):
            AttentionBackendEnum[name].get_class()


def test_without_a_configuration_the_stock_backend_stands() -> None:
    assert platform.CPU_ATTN.get_name() == "CPU_ATTN"
    with pytest.raises(AttributeError, match="no attribute 'XPU_ATTN'"):
        platform.XPU_ATTN  # noqa: B018


# -- The choice on CUDA ----------------------------------------------------------------------------------------------


def test_what_vllm_asks_on_cuda_and_not_on_the_cpu() -> None:
    """Our own checks answer the rest on both (`test_refusals.py`), by sentences and not by a list of reasons."""
    usual: dict[str, Any] = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
    backend = AttentionBackendEnum[NAME].get_class()
    for asked in ({}, {"has_sink": True, "has_sliding_window": True, "use_mm_prefix": True}):
        config = AttentionSelectorConfig(**(usual | asked))
        assert backend.validate_configuration(device_capability=DeviceCapability(9, 0), **config._asdict()) == []
    for kind in ("use_mla", "use_sparse"):
        config = AttentionSelectorConfig(**(usual | {kind: True}))
        with pytest.raises(ValueError, match=r"^shadowkv does not support MLA models, .*; use another --attention-"):
            backend.validate_configuration(device_capability=DeviceCapability(9, 0), **config._asdict())


CUDA = """
import sys
from types import ModuleType

# Only a CUDA build of vLLM has it; the CPU's has the rest of the platform.
import torch
sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
from vllm_shadowkv import extension, plugin
plugin.register()
from vllm.platforms import cuda
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

class Platform(cuda.CudaPlatformBase):
    @classmethod
    def get_device_capability(cls, device_id=0):
        return capability

asked = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None)
for capability in DeviceCapability(9, 0), DeviceCapability(8, 0):
    print("said", Platform.get_attn_backend_cls(AttentionBackendEnum.SHADOWKV, asked))
try:
    Platform.get_attn_backend_cls(AttentionBackendEnum.SHADOWKV, asked._replace(use_mla=True))
except ValueError as error:
    print("said", error)
"""


def test_vllms_cuda_platform_chooses_the_backend() -> None:
    *chosen, refused = python(CUDA)
    assert chosen == [BACKEND, BACKEND]
    assert refused.startswith("shadowkv does not support MLA models, "), "in our words, not in a list of reasons"


# -- The engine's configuration --------------------------------------------------------------------------------------


def test_engine_arguments(tmp_path: Path) -> None:
    arguments = EngineArgs(
        model=write_tiny_llama(tmp_path),
        skip_tokenizer_init=True,
        attention_backend="shadowkv",
        additional_config={"shadowkv": {"rank": 32}},
        max_model_len=2048,
    )
    config = arguments.create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum[NAME]
    assert config.additional_config == {"shadowkv": {"rank": 32}}


def test_customize_spec_leaves_other_specs_alone() -> None:
    other: Any = SimpleNamespace()
    assert ShadowKVBackend.customize_spec(other) is other
    assert ExactGroupBackend.customize_spec(other) is other
