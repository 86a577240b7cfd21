"""Starts an engine for every line of stdin, each in a fork of this process, and says in a line how that went.

    python doors.py v1|v2    reads a `Door` as JSON per line, and answers each with an `Answer`

This process has imported vLLM, and that is all: no engine was built in it, and no general plugin was loaded, so a fork
is as a user's process that is about to say `vllm.LLM(...)`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

HERE = Path(__file__).parent
LIMIT_SECONDS = 300  # an engine that hangs says where, and ends

Platform = Literal["cpu", "cuda"]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Door:
    """An engine that someone tries to start.

    Attributes:
        model: fields of its `config.json`, beside `architectures.SHAPE`; with `weights`, beside `sharp_model`'s.
        options: of `vllm.LLM`, beside those of `_options`; None takes one away. "{folder}" in a path of the KV
            connector is the model's folder.
        environment: variables.
        platform: the CPU, or CUDA emulated on it.
        weights: write some, with scales of an fp8 KV cache or without; "": vLLM makes them up.
        draft: fields of the `config.json` of a draft model.
        prompts: lengths of prompts that are asked, one after the other; not positive: from the longest request's on.
        generated: tokens that are asked of each.
        capability: of the GPU.
        architectures: that the extension's CUDA kernels are built for; "": it has none.
        wsl: the GPU is one of Windows, for which vLLM pins no memory unless it is told to.
        library: what there is on CUDA to attend over exact pages with.
        instead: values of attributes of modules, by their path.
        runner: which of vLLM's model runners the host is for.
    """

    model: Fields
    options: Fields = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    platform: Platform = "cpu"
    weights: Literal["", "plain", "scales"] = ""
    draft: Fields | None = None
    prompts: tuple[int, ...] = (40,)
    generated: int = 1
    capability: tuple[int, int] = (9, 0)
    architectures: str = "8.0;9.0"
    wsl: bool = False
    library: Literal["flash_attention", "xformers", "xformers without kernels", "neither"] = "flash_attention"
    instead: Mapping[str, str] = field(default_factory=dict)
    runner: Literal["v1", "v2"] = "v1"


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        error: type and text of the exception that ended the start; "": the engine started.
        tokens: what followed each prompt, or type and text of the exception that refused it; of a model that generates
            none, the length of the embedding.
        max_model_len: of the engine.
        boundaries: the exact boundary in the worker and in the scheduler, if ours serves.
        log: the end of what the process wrote.
    """

    error: str = ""
    tokens: tuple[Any, ...] = ()
    max_model_len: int = 0
    boundaries: tuple[Fields, ...] = ()
    log: str = ""


class Host:
    """The process, seen from the tests. A door that was tried is not tried again."""

    def __init__(self, runner: str = "v1") -> None:
        """Starts it."""
        from engine import ENVIRONMENT

        self._process = subprocess.Popen(
            [sys.executable, __file__, runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        self._known: dict[str, Answer] = {}

    def __call__(self, door: Door) -> Answer:
        """Tries a door."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps(asdict(door), sort_keys=True)
        if line not in self._known:
            print(line, file=self._process.stdin, flush=True)
            self._known[line] = Answer(**json.loads(self._process.stdout.readline()))
        return self._known[line]

    def close(self) -> None:
        """Ends the process; nothing runs in it between doors."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_SECONDS)


def main(runner: str) -> None:
    if runner == "v2":
        import v2_on_cpu.interpreter  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.plugins

    assert not vllm.plugins.plugins_loaded
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if child == 0:
                _try_and_exit(Door(**json.loads(line)), answer.fileno(), log.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in (answer, log):
                file.seek(0)
            said = json.loads(answer.read() or "{}") or {"error": f"exit status {status}"}
            print(json.dumps(said | {"log": log.read()[-20_000:]}), flush=True)


def _try_and_exit(door: Door, answer: int, log: int) -> None:
    """Ends the process: nothing of the parent's exit runs in it."""
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
        os.write(answer, json.dumps(asdict(_try(door))).encode())
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _try(door: Door) -> Answer:
    import torch._dynamo
    from trial import inspect_models_here

    os.environ |= door.environment
    torch._dynamo.config.disable = True  # vLLM compiles a helper of its sampler all the same, which takes seconds
    gc.collect = lambda generation=2: 0  # vLLM calls it several times per engine; it would take most of the time
    inspect_models_here()
    if door.platform == "cuda":
        _emulate_cuda(door)
    for path, value in door.instead.items():
        module, _, name = path.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, name, type(getattr(owner, name))(value))
    with tempfile.TemporaryDirectory() as folder:
        _write_model(door, Path(folder))
        try:
            from vllm import LLM

            llm = LLM(folder, **_options(door, Path(folder)))
        except Exception as error:
            return Answer(error=f"{type(error).__name__}: {error}")
        longest = llm.model_config.max_model_len
        lengths = (length if length > 0 else longest + length for length in door.prompts)
        tokens = tuple(_ask(llm, length, door.generated) for length in lengths)
        return Answer(tokens=tokens, max_model_len=longest, boundaries=_boundaries(llm))


def _options(door: Door, folder: Path) -> dict[str, Any]:
    import torch

    options: dict[str, Any] = {
        "attention_backend": "shadowkv",
        "dtype": "bfloat16",
        "enforce_eager": True,
        "load_format": "auto" if door.weights else "dummy",
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 2,
        "skip_tokenizer_init": True,
        **door.options,
    }
    if options["dtype"] == "torch.float64":  # vLLM takes it as an object only
        options["dtype"] = torch.float64
    if (options.get("kv_transfer_config") or {}).get("kv_connector_extra_config"):
        options["kv_transfer_config"] = json.loads(
            json.dumps(options["kv_transfer_config"]).replace("{folder}", str(folder))
        )
    if door.draft is not None:
        options["speculative_config"] = options["speculative_config"] | {"model": str(folder / "draft")}
    return {name: value for name, value in options.items() if value is not None}


def _write_model(door: Door, folder: Path) -> None:
    """Writes it with a tokenizer, which most doors do not use."""
    import extras
    from architectures import SHAPE

    known: Fields = SHAPE
    path = folder / "config.json"
    if door.weights:
        _write_weights(folder, scales=door.weights == "scales")
        known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, **door.model}))
    extras.tokenizer(folder, folder)
    if door.draft is not None:
        (folder / "draft").mkdir()
        (folder / "draft" / "config.json").write_text(json.dumps({**SHAPE, **door.draft}))


def _write_weights(folder: Path, scales: bool) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from sharp_model import LAYERS, write_sharp_model

    write_sharp_model(folder)
    path = folder / "model.safetensors"
    names = [f"model.layers.{layer}.self_attn.{of}_scale" for layer in range(LAYERS) for of in "kv"] if scales else []
    save_file(load_file(path) | {name: torch.tensor([0.37]) for name in names}, path, metadata={"format": "pt"})


def _ask(llm: Any, length: int, generated: int) -> Any:
    from vllm import SamplingParams

    prompt: Any = {"prompt_token_ids": [3 + number * number % 97 for number in range(length)]}
    try:
        if llm.model_config.runner_type == "pooling":
            return len(llm.embed(prompt, use_tqdm=False)[0].outputs.embedding)
        params = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
        return list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _boundaries(llm: Any) -> tuple[Fields, ...]:
    if "vllm_shadowkv.integration.worker.runtime" not in sys.modules:  # another backend, or workers elsewhere
        return ()
    from vllm_shadowkv.integration.scheduler.exact import ExactManager
    from vllm_shadowkv.integration.worker.runtime import Runtime

    managers = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    of_scheduler = [manager.boundary for manager in managers if isinstance(manager, ExactManager)]
    return tuple(map(asdict, (Runtime.latest().memory.bind().boundary, *of_scheduler)))


def _emulate_cuda(door: Door) -> None:
    """Our modules see CUDA, and vLLM's CUDA platform decides where ours is asked for; other backends are the CPU's."""
    sys.path.append(str(HERE.parent))
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")  # only a CUDA build of vLLM has it
    import emulated_cuda
    from vllm.platforms import cpu, cuda, current_platform
    from vllm.platforms.interface import DeviceCapability

    from vllm_shadowkv import extension
    from vllm_shadowkv.integration import refusals
    from vllm_shadowkv.integration.worker import geometry, layers, machine, memory

    emulated_cuda.install("flash_attention" if door.library == "flash_attention" else "xformers")
    if door.library == "neither":
        sys.modules["xformers.ops"] = None  # type: ignore[assignment]
    elif door.library == "xformers without kernels":
        _take_kernels_away()
    compiled = SimpleNamespace(has_cuda=lambda: bool(door.architectures), cuda_architectures=lambda: door.architectures)
    extension.load = lambda: compiled  # type: ignore[assignment]

    cuda.in_wsl, cuda._get_wsl_kernel_version = lambda: door.wsl, lambda: (5, 15, 0)

    class Cuda(cuda.CudaPlatformBase):
        get_device_capability = staticmethod(lambda device_id=0: DeviceCapability(*door.capability))

    class Ours(cpu.CpuPlatform):
        is_cpu = staticmethod(lambda: False)
        is_cuda = staticmethod(lambda: True)
        is_pin_memory_available = Cuda.is_pin_memory_available
        get_device_capability = Cuda.get_device_capability

    for module in (refusals, geometry, layers, machine, memory):
        module.current_platform = Ours()  # type: ignore[attr-defined]
    platform = type(current_platform)
    check = platform.check_and_update_config

    def choose(selected: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected is not None and selected.name == "SHADOWKV":
            return Cuda.get_attn_backend_cls(selected, attn_selector_config, num_heads)
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    def check_and_keep(vllm_config: Any) -> None:
        """The CPU platform turns asynchronous scheduling off, because it would gain nothing."""
        asynchronous = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    platform.get_attn_backend_cls = staticmethod(choose)
    platform.check_and_update_config = staticmethod(check_and_keep)


def _take_kernels_away() -> None:
    import fake_xformers

    def apply(inputs: Any, needs_gradient: bool) -> Any:
        raise NotImplementedError("no operator found")

    fake_xformers.Kernel.apply = staticmethod(apply)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
