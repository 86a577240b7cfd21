"""Runs engines for the tests, one after the other, each in a fork of this process, which imports vLLM once.

    python trial.py v1|v2 cpu|gpu [TORCHVISION]

reads one trial per line from stdin, and answers each with a line: its exit status. TORCHVISION is a folder with that
library's code. A trial is a JSON object, `engine.Trial`; its result goes to the file that it names. This process
computes nothing itself: a fork after the first parallel computation would hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 1200  # a trial that hangs says where, and ends


def main(runner: str, device: str, torchvision: str = "") -> None:
    if device == "cpu" and runner == "v2":
        import v2_on_cpu.interpreter  # noqa: F401
    if torchvision:
        _add_torchvision(torchvision)
    if device == "cpu":  # a fork cannot use a GPU that this process has looked at, so there each imports vLLM itself
        import vllm.entrypoints.llm  # noqa: F401

    for line in sys.stdin:
        trial = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_and_exit(trial)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _add_torchvision(folder: str) -> None:
    """Makes its code known, and declares the operators that it names as soon as it is imported."""
    import torch

    sys.path.insert(0, folder)
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401  while the library lives


def _run_and_exit(trial: dict[str, Any]) -> None:
    """Ends the process: nothing of the parent's exit runs in it."""
    status = 1
    try:
        with Path(trial["log"]).open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            result = run_engines(trial) if "engines" in trial else run(trial)
            Path(trial["result"]).write_text(json.dumps(result))
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_engines(trial: dict[str, Any]) -> dict[str, Any]:
    """Writes a model, and runs several trials of it one after the other; see `engine.ModelTrial`."""
    import without_torchvision
    from architectures import IMAGES, WITH_DELTA_NETS, write_model
    from by_hand import register_nemotron_super

    if trial["architecture"] in IMAGES and not trial["images"]:
        without_torchvision.install()
        _add_to_path("spawned")
    if trial["architecture"] in WITH_DELTA_NETS:
        import delta_net

        delta_net.install()
    if trial["architecture"] == "nemotron-super":
        register_nemotron_super()
    if trial["architecture"].startswith("lfm2"):
        _turn_heads_in_three_dimensions()
    inspect_models_here()
    gc.collect = lambda generation=2: 0  # vLLM calls it several times per engine; it would take most of the time
    with tempfile.TemporaryDirectory() as model:
        write_model(trial["architecture"], Path(model))
        if trial["images"]:
            import images

            images.write_processor(trial["architecture"], Path(model))
        of_model = {"model": model, "result": trial["result"]}
        return {engine["name"]: run(engine | of_model, shut_down=True) for engine in trial["engines"]}


def _add_to_path(spawned: str) -> None:
    """Of processes that vLLM spawns: this folder, and one with what they begin with."""
    here = Path(__file__).parent
    paths = [str(here / spawned), str(here), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _turn_heads_in_three_dimensions() -> None:
    """LFM2 turns queries and keys `[tokens, heads, head_size]`, with which vLLM 0.32's kernel for the CPU turns others.

    What its stock backend says depends on what else is in a batch then; so both are compared with that mended.
    """
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    forward = RotaryEmbedding.forward_cpu

    def forward_flat(self: Any, positions: Any, query: Any, key: Any = None, *more: Any) -> Any:
        turned = forward(self, positions, query.flatten(1), key.flatten(1), *more)
        return turned[0].view_as(query), turned[1].view_as(key)

    RotaryEmbedding.forward_cpu = forward_flat


def inspect_models_here() -> None:
    """VLLM looks at a model's class in a process of its own, because of CUDA, and that must import vLLM again."""
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    _LazyRegisteredModel.inspect_model_cls = lambda self: _ModelInfo.from_model_cls(self.load_model_cls())


def run(trial: dict[str, Any], shut_down: bool = False) -> dict[str, Any]:
    """Starts an engine and asks the trial's scenarios of it, then the first of them with each plant.

    Args:
        trial: `engine.Trial`, and the `model`.
        shut_down: leave the process fit for another engine.
    """
    counts: dict[str, int] = {}
    if trial["in_process"]:
        _count_events(counts)
    if trial["poison"]:
        import poison

        poison.install()
    if trial["emulated_cuda"]:
        sys.path.append(str(Path(__file__).parents[1]))
        import emulated_cuda

        emulated_cuda.install(trial["emulated_cuda"])
    extras = Path(trial["result"]).with_suffix("")
    llm = start(trial, _write_extras(trial, extras))
    if trial["in_process"] and trial["shadowkv"] is not None:
        counts["host pools at start-up"] = _host_pools_at_start_up()
    if "speculative_config" in trial["options"]:
        _draft_from_memory()

    from scenarios import SCENARIOS, Asker

    if trial["warm_up"]:
        from v2_on_cpu import warm_up

        counts["warm-up plans"] = warm_up.run(_worker(llm))
    asker = Asker(llm, margins=trial["shadowkv"] is None, adapters=extras / "adapters")
    if trial["graphs"]:
        _capture_graphs(llm)
    sequences = {name: SCENARIOS[name](asker) for name in trial["scenarios"]}
    planted = {plant: _ask_with_plant(plant, llm, asker, trial) for plant in trial["plants"]}
    if trial["in_process"]:
        _check_nothing_is_left(llm, ours=trial["shadowkv"] is not None)
    if trial["poison"]:
        counts["poisoned"] = poison.poisoned
    if trial["shadowkv"] is not None and trial["in_process"]:
        _note_pool(llm, counts)
    if trial["graphs"]:
        from v2_on_cpu import emulated_graphs

        counts["replays"] = emulated_graphs.replays
    counts |= _metrics()
    if shut_down:
        llm.llm_engine.engine_core.shutdown()
    elif trial["in_process"] and trial["shadowkv"] is not None:
        pools = _host_pools()
        del llm, asker
        gc.collect()
        counts["host pools left"] = sum(pool() is not None for pool in pools)
    return {"sequences": sequences, "planted": planted, "counts": dict(counts)}


def _metrics() -> dict[str, int]:
    """Our metrics as `LLM.get_metrics` would show them, by name, and phase or kind."""
    from prometheus_client import REGISTRY

    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return {
        " ".join([sample.name, *(sample.labels[name] for name in ("phase", "kind") if name in sample.labels)]): int(
            sample.value
        )
        for sample in samples
        if sample.name.startswith("vllm:shadowkv_")
    }


def _host_pools_at_start_up() -> int:
    from vllm_shadowkv.integration.worker.runtime import Runtime

    bound = Runtime.latest().memory._bound
    return 0 if bound is None else len(bound.memories)


def _host_pools() -> list[Any]:
    from vllm_shadowkv.integration.worker.runtime import Runtime

    return [weakref.ref(memory.host_pool) for memory in Runtime.latest().memory.bind().memories.values()]


def _write_extras(trial: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Makes the trial's extras, and returns the options of `vllm.LLM` that they ask for."""
    from extras import EXTRAS

    options: dict[str, Any] = {}
    for name in trial["extras"]:
        folder = directory / name
        folder.mkdir(parents=True)
        options |= EXTRAS[name](Path(trial["model"]), folder)
    return options


def start(trial: dict[str, Any], extras: dict[str, Any]) -> Any:
    """An engine with the trial's backend and the options of its extras."""
    import torch._dynamo

    if trial["options"].get("enforce_eager", True):
        # vLLM compiles a helper of its sampler all the same, which takes seconds.
        torch._dynamo.config.disable = True
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if trial["in_process"] else "1"
    if trial["runner"] == "v2" and not trial["in_process"]:
        _add_to_path("v2_on_cpu/spawned")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from vllm import LLM

    if trial["asynchronous"]:
        _allow_asynchronous_scheduling()
    backend: dict[str, Any] = {}
    if trial["shadowkv"] is not None:
        backend = {"attention_backend": "shadowkv", "additional_config": {"shadowkv": trial["shadowkv"]}}
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True}
    options |= {"enforce_eager": True, "max_model_len": 2048, "max_num_batched_tokens": 200, "max_num_seqs": 8}
    return LLM(**({"model": trial["model"]} | options | backend | extras | trial["options"]))


def _allow_asynchronous_scheduling() -> None:
    """vLLM's CPU platform turns it off, because it would gain nothing."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_turn_on(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(check_and_turn_on)


def _count_events(counts: dict[str, int]) -> None:
    """Counts what the tests want to have happened."""
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    from vllm_shadowkv.integration.worker import sealing

    for event, owner, name in (
        ("replays", torch.cuda.CUDAGraph, "replay"),
        ("preemptions", Scheduler, "_preempt_request"),
        ("seals", sealing, "seal_blocks"),
        ("asynchronous steps", EngineCore, "step_with_batch_queue"),
    ):
        counts[event] = 0
        setattr(owner, name, _counting(counts, event, getattr(owner, name)))

    counts["accepted drafts"] = 0
    original = Scheduler.make_spec_decoding_stats

    def make_spec_decoding_stats(self: Any, *args: Any, num_accepted_tokens: int, **kwargs: Any) -> Any:
        counts["accepted drafts"] += num_accepted_tokens
        return original(self, *args, num_accepted_tokens=num_accepted_tokens, **kwargs)

    Scheduler.make_spec_decoding_stats = make_spec_decoding_stats


def _note_pool(llm: Any, counts: dict[str, int]) -> None:
    """What the engine has of memory, in blocks, tokens and bytes."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    from vllm_shadowkv.integration.worker.runtime import Runtime

    bound = Runtime.latest().memory.bind()
    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_config
    memories = bound.memories.values()
    counts["blocks"] = cache.num_blocks
    scales = [memory.query_scales for memory in memories]
    counts["weighed layers"] = sum(of_layer is not None and bool((of_layer != 1).any()) for of_layer in scales)
    context = core.vllm_config.compilation_config.static_forward_context.values()
    beside = len([one for one in context if isinstance(one, AttentionLayerBase)]) - 3 * len(scales)
    counts["layers to weigh"] = 0 if beside else len(scales)
    counts["device bytes"] = sum(memory.pages.nbytes for memory in memories)
    counts["host bytes"] = sum(memory.host_pool.nbytes for memory in memories)
    counts["exact prompt tokens"] = bound.boundary.prefill_exact_tokens or 0
    concurrency = get_max_concurrency_for_kv_cache_config(core.vllm_config, cache)
    counts["blocks of the longest request"] = round(cache.num_blocks / concurrency)


def _draft_from_memory() -> None:
    """Drafts go on as a sequence with the same beginning once went on; one in five is wrong."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    memory: dict[bytes, Any] = {}

    def propose(
        self: Any, count: int, sampled: list[list[int]], lengths: Any, token_ids: Any, **kwargs: Any
    ) -> list[list[int]]:
        drafts = []
        for row, tokens in enumerate(sampled):
            length = int(lengths[row])
            sequence = token_ids[row, :length].copy()
            beginning = sequence[:40].tobytes()
            known = memory.get(beginning, sequence)
            draft = []
            if len(known) <= length:
                memory[beginning] = sequence
            elif tokens and (known[:length] == sequence).all():
                draft = known[length : length + count].tolist()
            if draft and length % 5 == 0:
                draft[-1] += 1
            drafts.append(draft)
        return drafts

    NgramProposer.propose = propose


def _counting(counts: dict[str, int], event: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[event] += 1
        return original(*args, **kwargs)

    return call


def _ask_with_plant(plant: str, llm: Any, asker: Any, trial: dict[str, Any]) -> dict[str, Any]:
    """The trial's first scenario with an error planted."""
    from plants import PLANTS
    from scenarios import SCENARIOS

    with PLANTS[plant]():
        if trial["graphs"]:
            _capture_graphs(llm)
        return SCENARIOS[trial["scenarios"][0]](asker)


def _check_nothing_is_left(llm: Any, ours: bool) -> None:
    """Raises AssertionError where a block outlives its request, or the worker's state of the blocks is broken."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "a block is still in use"
    if not ours:
        return
    import torch
    from vllm.v1.core.kv_cache_utils import get_group_id

    from vllm_shadowkv.integration.scheduler.managers import ShadowManager
    from vllm_shadowkv.integration.worker.runtime import Runtime

    managers = manager.coordinator.single_type_managers
    groups = {group for group, of_one in enumerate(managers) if isinstance(of_one, ShadowManager)}
    hashes = ((block.block_id, block.block_hash) for block in pool.blocks)
    cached = [block for block, key in hashes if key is not None and get_group_id(key) in groups]
    runtime = Runtime.latest()
    bound = runtime.memory.bind()
    with torch.inference_mode():  # as a next step would
        runtime.planner._sealer.seal_due(bound)
    state = bound.state
    state.check_integrity(torch.tensor(cached, dtype=torch.int64))
    assert state.sealed[cached].all(), "a block can be hit and is not sealed"


def _capture_graphs(llm: Any) -> None:
    from v2_on_cpu import emulated_graphs

    emulated_graphs.capture(_worker(llm).model_runner)


def _worker(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
