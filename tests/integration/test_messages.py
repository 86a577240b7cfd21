"""Every message that a user can meet: what triggers it, and that it is one sentence with a way out.

`raise` statements are found in the source. Each must be reached by one of `TRIGGERS`, or be listed in `INTERNAL`, which
are errors of ours. Messages of the build are in tests/test_packaging.py, those of `doctor` in tests/cli/test_doctor.py.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli.test_model import LLAMA
from pydantic import ValidationError
from simulation import vllm_config
from test_refusals import (
    ENGINES,
    PLAIN,
    connector,
    drafting,
    engine,
    module,
    odd_pages,
    on,
    open_at,
    open_ranks,
    runtime_of,
    state,
)
from test_refusals import LAYER as OUR_LAYER
from test_rope import LAYER, blank, make_parent, make_rope, stand_in
from test_rope_transformers import LAYER as TRANSFORMERS_LAYER
from test_rope_transformers import make_config
from test_rope_transformers import make_parent as make_transformers_parent
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import ChunkedLocalAttention
from vllm.platforms.interface import DeviceCapability

import vllm_shadowkv
from vllm_shadowkv import extension
from vllm_shadowkv.cli import arguments, explain, plan
from vllm_shadowkv.config import ShadowKVConfig, StoreConfig
from vllm_shadowkv.integration import compat, platform, refusals
from vllm_shadowkv.integration.attention import choice
from vllm_shadowkv.integration.group_backend import GroupBackend
from vllm_shadowkv.integration.model import other_layers, rope
from vllm_shadowkv.integration.worker import impl
from vllm_shadowkv.integration.worker.runtime import Runtime
from vllm_shadowkv.page import plan_page
from vllm_shadowkv.state import host_pool
from vllm_shadowkv.state.host_memory import GIB

SOURCE = Path(vllm_shadowkv.__file__).parent
Site = tuple[str, int]
"""A file below the package, and the first line of a `raise` in it."""

INTERNAL = {
    "this is a bug, please report it": "says so itself",
    "has no attribute": "Python's own protocol: a module without that attribute",
    "fused quantisation of the attention output": "vLLM asks first whether we take it, and we say no",
    "was asked for before any attention layer was built": "an order of calls that vLLM does not have",
    "was not attached to a module": "as above",
    "needs at least one KV head": "no model has none",
}
"""Parts of statements that only an error of ours, or of vLLM's, can reach, and why."""
INTERNAL_FILES = {
    "state/block_store.py": "caught and logged; each is raised in tests/state/test_block_store.py",
    "rotary.py": "arguments, checked by tests/integration/test_rope.py; callers are ours",
    "state/low_rank.py": "arguments, checked by tests/state/test_low_rank.py; callers are ours",
}

Patch = pytest.MonkeyPatch
Trigger = Callable[[Patch, Path], Any]


def settings(**values: Any) -> Trigger:
    return lambda patch, folder: ShadowKVConfig.from_vllm({"shadowkv": values})


def page(head_size: int = 128, dtype: torch.dtype = torch.bfloat16, **values: Any) -> Trigger:
    return lambda patch, folder: plan_page(ShadowKVConfig(**values), 1, head_size, dtype)


def process(device: str, built_with_cuda: bool, capability: DeviceCapability | None = None) -> Trigger:
    def trigger(patch: Patch, folder: Path) -> None:
        on(patch, device, built_with_cuda, capability)
        refusals.check_process()

    return trigger


def random_hashes(patch: Patch, folder: Path) -> None:
    patch.delenv("PYTHONHASHSEED", raising=False)
    xxhash = engine(kv_transfer_config=connector(), cache_config__prefix_caching_hash_algo="xxhash")
    refusals.check_engine(xxhash, ShadowKVConfig())


def path_of_a_file(patch: Patch, folder: Path) -> None:
    (folder / "file").touch()
    open_at(folder / "file")


def layer(**changes: Any) -> Trigger:
    return lambda patch, folder: refusals.check_layer(**(PLAIN | changes))


def rotation(parent: Callable[[], nn.Module | None], head_size: int = 64) -> Trigger:
    def trigger(patch: Patch, folder: Path) -> None:
        with set_current_vllm_config(VllmConfig()):
            made = parent()
        rope.rotary_of(made, LAYER, head_size)

    return trigger


def llama(name: str = "llama.LlamaAttention", **attributes: Any) -> Any:
    return make_parent(make_rope("neox", 64, torch.float32), torch.float32, name, **attributes)


def renamed() -> Any:
    parent = llama()
    parent.attn.layer_name = "another"
    return parent


def of_dtype(dtype: Any) -> Any:
    parent = llama()
    parent.attn.dtype = dtype
    return parent


def command(what: Any, *line: str, config: Any = LLAMA) -> Trigger:
    """`plan` or `explain`; arguments come before the usual ones, argparse's exit as what it was raised for."""

    def trigger(patch: Patch, folder: Path) -> None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        parser = argparse.ArgumentParser(exit_on_error=False)
        arguments.add(parser, plan=what is plan)
        try:
            given = parser.parse_args([str(folder), "--kv-cache-gib", "64", "--host-gib", "1024", *line])
        except argparse.ArgumentError as error:
            raise error.__context__ or error from None
        what.run(given)

    return trigger


def version(patch: Patch, folder: Path) -> None:
    patch.setattr(compat.vllm, "__version__", "0.34.0")
    compat.check_vllm_version()


def library(content: bytes | None) -> Trigger:
    def trigger(patch: Patch, folder: Path) -> None:
        path = folder / "_C.abi3.so"
        if content is not None:
            path.write_bytes(content)
        patch.setattr(extension, "LIBRARY", path)
        extension.load.__wrapped__()

    return trigger


def in_place_of_ours(name: str) -> Trigger:
    """What vLLM takes although ours is selected."""

    def trigger(patch: Patch, folder: Path) -> None:
        backend = SimpleNamespace(name="SHADOWKV")
        selected = SimpleNamespace(attention_config=SimpleNamespace(backend=backend, backend_per_kind={}))
        patch.setattr(platform, "get_current_vllm_config_or_none", lambda: selected)
        getattr(platform, name)

    return trigger


def one_kind_on_the_cpu(patch: Patch, folder: Path) -> None:
    kinds = {"full_attention": SimpleNamespace(name="SHADOWKV")}
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=None, backend_per_kind=kinds))
    patch.setattr(platform, "get_current_vllm_config_or_none", lambda: config)
    _ = platform.CPU_ATTN


def mla_on_cuda(patch: Patch, folder: Path) -> None:
    GroupBackend.validate_configuration(use_mla=True, use_sparse=False)


def streaming_input(patch: Patch, folder: Path) -> None:
    patch.setattr(refusals, "count_refusal", lambda labels: None)
    refusals.check_request(SimpleNamespace(resumable=True), vllm_config())


def of_transformers(head_size: int, rope_type: str = "default") -> Trigger:
    """A layer of OLMo 2, whose rotary module turns 64 dimensions."""
    path = "olmo2.modeling_olmo2.Olmo2Attention"

    def trigger(patch: Patch, folder: Path) -> None:
        config = make_config(path)
        config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4}
        parent = make_transformers_parent(path, torch.float32, config)
        rope.rotary_of(parent, TRANSFORMERS_LAYER, head_size, max_positions=8)

    return trigger


def cuda_attention() -> None:
    choice.of_cuda(plan_page(ShadowKVConfig(), 8, 128, torch.bfloat16), 8, torch.device("cpu"))


def no_xformers(patch: Patch, folder: Path) -> None:
    patch.setitem(sys.modules, "xformers.ops", None)
    cuda_attention()


def unknown_argument(patch: Patch, folder: Path) -> None:
    patch.setattr(impl, "get_current_vllm_config", vllm_config)
    impl.ShadowKVImpl(num_heads=2, head_size=64, scale=1.0, num_kv_heads=1, indexer=object())


def unequal_layers(patch: Patch, folder: Path) -> None:
    runtime_of(patch).lay_out(num_heads=4, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)


def small_host(patch: Patch, folder: Path) -> None:
    runtime_of(patch, host_memory_gib=0.01).memory.bound_bytes(1 << 50)


def large_host_pool(patch: Patch, folder: Path) -> None:
    runtime_of(patch, host_memory_gib=17).memory.bound_bytes(1 << 50)


def pool_that_does_not_fit(patch: Patch, folder: Path) -> None:
    patch.setattr(host_pool, "free_bytes", lambda: GIB)
    host_pool.allocate(num_layers=2, num_blocks=1024, row_bytes=1 << 20)


def override_that_does_not_fit(patch: Patch, folder: Path) -> None:
    made = runtime_of(patch, host_memory_gib=1)
    made.geometry.vllm_config.cache_config = SimpleNamespace(num_gpu_blocks_override=1 << 20)
    made.memory.bound_bytes(1 << 50)


def pool_that_the_kernel_does_not_give(patch: Patch, folder: Path) -> None:
    patch.setattr(host_pool, "free_bytes", lambda: 1 << 62)
    host_pool.allocate(num_layers=1, num_blocks=1 << 40, row_bytes=1 << 20)


def pool_that_cannot_be_pinned(patch: Patch, folder: Path) -> None:
    patch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    host_pool.allocate(num_layers=1, num_blocks=1, row_bytes=64, gpu=0)


def no_matplotlib(patch: Patch, folder: Path) -> None:
    patch.setitem(sys.modules, "matplotlib", None)
    command(plan, "--plot", "plan.png")(patch, folder)


TRIGGERS: list[Trigger] = [
    # The settings.
    settings(bogus=1),
    settings(compression=3),
    settings(block_size=1000),
    settings(block_size=64),
    settings(rank=100),
    settings(sparse_budget=1001),
    settings(num_outlier_chunks=129),
    settings(slot_chunks=260),
    lambda patch, folder: ShadowKVConfig.from_vllm({"shadowkv": 1}),
    lambda patch, folder: StoreConfig.from_vllm({}),
    lambda patch, folder: StoreConfig.from_vllm({"path": "", "max_gb": 1}),
    page(head_size=100),
    page(dtype=torch.float64),
    page(compression=16, num_outlier_chunks=128),
    page(compression=16, key_codec="none"),
    # The process, the engine, the model.
    version,
    library(None),
    library(b"not a library"),
    process("xpu", built_with_cuda=True),
    process("cuda", built_with_cuda=False),
    process("cuda", built_with_cuda=True, capability=DeviceCapability(12, 0)),
    process("cuda", built_with_cuda=True, capability=DeviceCapability(7, 5)),
    *(lambda patch, folder, c=changes: refusals.check_engine(engine(**c), ShadowKVConfig()) for changes, _ in ENGINES),
    lambda patch, folder: (
        on(patch, "cuda", built_with_cuda=True),
        refusals.check_engine(engine(model_config__dtype=torch.float32), ShadowKVConfig()),
    ),
    lambda patch, folder: (
        on(patch, "cuda", built_with_cuda=True, pinned=False),
        refusals.check_engine(engine(), ShadowKVConfig()),
    ),
    lambda patch, folder: (
        patch.setenv("VLLM_BATCH_INVARIANT", "1"),
        refusals.check_engine(engine(), ShadowKVConfig()),
    ),
    random_hashes,
    path_of_a_file,
    lambda patch, folder: open_at(Path("/proc")),
    lambda patch, folder: open_at(Path("/dev/shm")),
    lambda patch, folder: open_ranks("a", "b"),
    lambda patch, folder: refusals.check_connected(ours=False, beside=False),
    lambda patch, folder: refusals.check_connected(ours=True, beside=True),
    lambda patch, folder: refusals.check_positions(4096, 8192),
    lambda patch, folder: refusals.check_cuda_shape(34, 2, 400),
    lambda patch, folder: refusals.check_cuda_shape(32, 2, 6160),
    layer(attn_type="encoder_only"),
    lambda patch, folder: refusals.check_served(0, 1),
    lambda patch, folder: refusals.check_chunks(engine(cache_config__enable_prefix_caching=True)),
    layer(alibi_slopes=[0.5]),
    layer(logits_soft_cap=50.0),
    layer(kv_sharing_target_layer_name="layers.0"),
    lambda patch, folder: refusals.check_module(module(ChunkedLocalAttention)),
    lambda patch, folder: refusals.check_module(module(head_size_v=32)),
    unknown_argument,
    unequal_layers,
    lambda patch, folder: odd_pages(runtime_of(patch)).layers.spec_fields(OUR_LAYER),
    lambda patch, folder: state(runtime_of(patch), 33).layers.spec_fields(OUR_LAYER),
    lambda patch, folder: other_layers.check_group(["layers.0"], 2),
    lambda patch, folder: Runtime.of(drafting(runtime_of(patch))),
    streaming_input,
    in_place_of_ours("FLASH_ATTN_DIFFKV"),
    mla_on_cuda,
    one_kind_on_the_cpu,
    in_place_of_ours("CPU_MLA"),
    no_xformers,
    lambda patch, folder: cuda_attention(),
    rotation(lambda: None),
    rotation(lambda: nn.ModuleList()),
    rotation(lambda: stand_in("llama.LlamaAttention")),
    rotation(lambda: make_parent(blank(nn.Identity, head_size=64, rotary_dim=64), torch.float32)),
    rotation(llama, head_size=192),
    rotation(renamed),
    rotation(lambda: of_dtype("float32")),
    rotation(lambda: llama("llama4.Llama4Attention", qk_norm=nn.Identity())),
    rotation(lambda: llama("hy_v3.HYV3Attention", hpc_rope_norm=nn.Identity())),
    of_transformers(head_size=32),
    of_transformers(head_size=64, rope_type="dynamic"),
    # Host memory.
    small_host,
    large_host_pool,
    pool_that_does_not_fit,
    override_that_does_not_fit,
    pool_that_the_kernel_does_not_give,
    pool_that_cannot_be_pinned,
    # The command.
    command(plan, "--additional-config", "{"),
    command(plan, "--additional-config", "[]"),
    command(plan, "--contexts", "0"),
    command(plan, "--max-model-len", "128k"),
    command(plan, "--kv-cache-gib", "-1"),
    command(plan, "--host-gib", "64GB"),
    command(plan, "--kv-cache-gib", "1"),
    command(plan, "--contexts", "1000000"),
    command(plan, "--plot", "plan.nothing"),
    no_matplotlib,
    command(plan, "-tp", "3"),
    command(plan, config="{"),
    command(plan, config="[]"),
    command(plan, config={}),
    command(explain, config=LLAMA | {"kv_lora_rank": 512}),
    command(plan, config=LLAMA | {"layer_types": ["linear_attention", "full_attention"]}),
    command(plan, config=LLAMA | {"sliding_window": 4096}),
    command(plan, config=LLAMA | {"attn_logit_softcapping": 50.0}),
    command(plan, config=LLAMA | {"mamba_d_state": 16}),
    lambda patch, folder: arguments.model(
        argparse.Namespace(
            model=str(folder / "x"), dtype="auto", tensor_parallel_size=1, pipeline_parallel_size=1, max_model_len=None
        )
    ),
]


def raises() -> dict[Site, ast.Raise]:
    """Every `raise` of the package, re-raises without an exception left out."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found[str(path.relative_to(SOURCE)), node.lineno] = node
    return found


def sites_of(error: BaseException | None, known: dict[Site, ast.Raise]) -> Iterator[Site]:
    """The statements that raised an error and what led to it."""
    while error is not None:
        yield from _raised_at(error, known)
        if isinstance(error, ValidationError):
            for item in error.errors():
                yield from _raised_at(item.get("ctx", {}).get("error"), known)
        error = error.__cause__ or error.__context__


def _raised_at(error: Any, known: dict[Site, ast.Raise]) -> Iterator[Site]:
    trace = getattr(error, "__traceback__", None)
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(SOURCE):
            name = str(path.relative_to(SOURCE))
            for (file, first), node in known.items():
                if file == name and first <= trace.tb_lineno <= (node.end_lineno or first):
                    yield file, first
        trace = trace.tb_next


@functools.cache
def triggered() -> tuple[list[str], set[Site]]:
    """What the triggers say, and the statements they reach."""
    import tempfile

    messages, reached, known = [], set[Site](), raises()
    for trigger in TRIGGERS:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            try:
                trigger(patch, Path(folder))
            except (Exception, argparse.ArgumentTypeError) as error:
                messages.append(f"{type(error).__name__}: {error}")
                reached |= set(sites_of(error, known))
                continue
        raise AssertionError(f"trigger {len(messages)} raised nothing")
    return messages, reached


def internal(site: Site, node: ast.Raise) -> bool:
    text = ast.unparse(node)
    return site[0] in INTERNAL_FILES or any(part in text for part in INTERNAL)


def test_every_message_is_triggered() -> None:
    known = raises()
    _, reached = triggered()
    missing = [
        f"{file}:{line}: {ast.unparse(node)[:100]}"
        for (file, line), node in known.items()
        if (file, line) not in reached and not internal((file, line), node)
    ]
    assert not missing, "no trigger reaches\n" + "\n".join(missing)


def test_what_is_internal_exists_and_is_not_met() -> None:
    known = raises()
    _, reached = triggered()
    assert [site for site in reached if internal(site, known[site])] == []
    texts = [ast.unparse(node) for node in known.values()]
    assert [part for part in INTERNAL if not any(part in text for text in texts)] == []
    assert {file for file, _ in known} >= set(INTERNAL_FILES)


def test_messages_are_one_sentence_with_a_way_out() -> None:
    messages, _ = triggered()
    wrong = []
    for message in messages:
        kind, _, text = message.partition(": ")
        if kind == "ArgumentTypeError":  # argparse puts the argument before it
            good = re.fullmatch(r"must be .*, got .*", text)
        else:
            good = re.match(
                r"(shadowkv|ShadowKV|--additional-config|--kv-transfer-config|the compiled extension)", text
            )
            good = good and text.endswith(".") and not re.search(r"[a-z]\. [A-Z]", text)
            good = good and ("; " in text or text.startswith(("--additional-config", "--kv-transfer-config")))
        if not good or "\n" in text:
            wrong.append(message)
    assert not wrong, "\n".join(wrong)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    said = "\n".join(triggered()[0])
    page = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    quoted = [part for row in rows if "vLLM's own" not in row for part in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    assert [part for part in quoted if part not in said] == []


@pytest.mark.parametrize("function", ["check_engine", "check_layer"])
def test_every_sentence_of_a_table_is_triggered(function: str) -> None:
    """Those functions raise in one place, for each of a table of sentences."""
    tree = ast.parse((SOURCE / "integration" / "refusals.py").read_text())
    [body] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    body.body = body.body[1:]  # the docstring
    texts = [node.value for node in ast.walk(body) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    sentences = [text for text in texts if " " in text.strip()]
    said = "\n".join(triggered()[0])
    assert len(sentences) > 3
    assert [text for text in sentences if text.strip() not in said] == []


def test_warnings_are_few() -> None:
    """Tested in test_exposition, test_refusals, test_exact_attention, test_transfers. Another needs a test too."""
    warned = [
        f"{path.relative_to(SOURCE)}: {ast.unparse(node.args[0])}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("logger.warning", "logger.error", "warnings.warn")
    ]
    assert [text[:80] for text in warned] == [
        "exposition.py: 'shadowkv: no metrics of this process, for it cannot have an abst",
        "integration/attention/choice.py: 'shadowkv computes prefills with xformers, whic",
        "integration/compat.py: 'shadowkv is not tested with vLLM %s; going on because %s",
        "integration/worker/geometry.py: 'shadowkv: --long-prefill-token-threshold %d com",
        "integration/worker/machine.py: 'shadowkv: %d KV cache blocks instead of the %d t",
        "integration/worker/transfers.py: 'shadowkv: files are written to %s more slowly ",
        "integration/worker/transfers.py: 'shadowkv: block %s in %s %s; it is computed.'",
        "integration/worker/transfers.py: 'shadowkv: blocks cannot be written to %s: %s.'",
        "integration/worker/transfers.py: 'shadowkv: blocks could not be filled and are c",
    ]
