# `make test` and `make demo` need nothing but Python 3.11 or newer on a fresh Linux machine: they
# make a virtual environment of their own. A C++ compiler and nvcc are used where there are any.

PYTHON ?= python3
VENV := .venv
STACKS := .venv-stacks
PIP := $(VENV)/bin/pip --disable-pip-version-check
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: demo test test-kernels test-stacks test-versions test-long test-exhaustive sanitize sanitize-memory \
	sanitize-threads lint bench gpu-check \
	studies check clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A torch that is built for GPUs brings the Triton that it was built with, and keeps it.
$(VENV)/installed: $(SOURCES) constraints.txt | $(VENV)/bin/python
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt torch setuptools wheel pybind11
	$(BIN)/python -c "import triton" 2> /dev/null || cp constraints.txt $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,demo,lint]"
	touch $@

# What torch 2.11, 2.13 and 2.14 bring: the kernels are compiled with these too, beside what is installed.
TRITONS ?= 3.6.0 3.7.1 3.8.0
$(VENV)/triton-%: | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps --target $@ triton==$*

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# One thread a worker: the tests are many and small, and those of threads set their own number.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not kernels and not stacks"

# All kernels as they are compiled, by each compiler: looked at, and run by an emulator.
test-kernels: $(VENV)/installed $(TRITONS:%=$(VENV)/triton-%)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m kernels

# The trainers that people use, as constraints.txt pins them, in an environment of their own.
$(STACKS)/installed: $(SOURCES) constraints.txt
	$(PYTHON) -m venv $(STACKS)
	grep -v '^triton==' constraints.txt > $(STACKS)/constraints.txt
	$(STACKS)/bin/pip --disable-pip-version-check install --quiet -c $(STACKS)/constraints.txt torch setuptools wheel pybind11
	$(STACKS)/bin/python -c "import triton" 2> /dev/null || cp constraints.txt $(STACKS)/constraints.txt
	FUSED_OPTIM_BUILD=cpu $(STACKS)/bin/pip --disable-pip-version-check install --quiet \
		-c $(STACKS)/constraints.txt --no-build-isolation -e ".[stacks]"
	touch $@

# What docs/recipes.md names, with the backend that a CPU has for its users: not Triton's interpreter, which takes ten
# times as long. STACKED="-m stacks" leaves out what `make test` has.
STACKED ?= -m "not kernels"
test-stacks: $(STACKS)/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(STACKS)/bin/python -m pytest -q -n auto tests/stacks $(STACKED) \
		$$(grep -oE 'pytest tests/test_\w+\.py' docs/recipes.md | cut -d' ' -f2 | sort -u)

# The contract with other versions of torch and Python: each is <torch>-<Python>, and wants that python on the
# PATH. A torch built for GPUs takes some 5 GB.
VERSIONS ?= 2.11.0-3.10 2.15.0-3.13
CONTRACT ?= tests/test_optimizer.py tests/test_checkpoints.py tests/test_optax.py tests/test_stacks.py
.venv-torch-%/installed: $(SOURCES)
	python$(word 2,$(subst -, ,$*)) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip --disable-pip-version-check install --quiet torch==$(word 1,$(subst -, ,$*)) \
		"setuptools>=77" wheel pybind11 pytest pytest-xdist hypothesis numpy jax optax safetensors
	FUSED_OPTIM_BUILD=cpu .venv-torch-$*/bin/pip --disable-pip-version-check install --quiet --no-deps \
		--no-build-isolation -e .
	touch $@

test-torch-%: .venv-torch-%/installed
	OMP_NUM_THREADS=1 .venv-torch-$*/bin/python -m pytest -q -n auto $(CONTRACT)
	OMP_NUM_THREADS=1 .venv-torch-$*/bin/python -m pytest -q -n auto tests/test_backends.py -k cpu

.PRECIOUS: .venv-torch-%/installed
test-versions: $(VERSIONS:%=test-torch-%)

# All 2^32 bit patterns: some ten minutes on two cores.
test-exhaustive: $(VENV)/installed
	FUSED_OPTIM_EXHAUSTIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/test_codecs.py

# 10,000 histories, 100,000 property cases, 200,000 steps and 20,000 optimizers.
test-long: $(VENV)/installed
	FUSED_OPTIM_SEQUENCES=10000 FUSED_OPTIM_CASES=100000 FUSED_OPTIM_STEPS=200000 OMP_NUM_THREADS=1 \
		OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto tests/test_histories.py tests/test_properties.py tests/test_long_runs.py

# The CPU extension under AddressSanitizer and UndefinedBehaviorSanitizer: the first report ends it. CPython's own
# leaks are not looked for. SANITIZED are pytest's arguments.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZED ?= tests/test_backends.py tests/test_histories.py tests/test_codecs.py -k "cpu or histories"
SANITIZER = $(realpath $(shell gcc -print-file-name=lib$(1).so))
sanitize: sanitize-memory sanitize-threads
sanitize-memory: $(VENV)/installed
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" FUSED_OPTIM_BUILD=cpu \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	nm -D build/sanitize/lib/fused_optim/_cpu.*.so | grep -q __asan  # some setuptools give C++ no CFLAGS
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(call SANITIZER,$(name)))" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --capture=sys -p no:cacheprovider \
		-o pythonpath="build/sanitize/lib tests ." $(SANITIZED)

# Under ThreadSanitizer, with clang's OpenMP: of what gcc's threads wait for it sees nothing. clang's Archer tells it
# of parallel regions. clang's runtime cannot be preloaded, and gcc's is the same.
LLVM := $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
THREADED ?= tests/test_backends.py tests/test_clipping.py tests/test_faults.py -k "number_of_threads or two_threads"
ifeq ($(and $(shell command -v clang++),$(LLVM),$(call SANITIZER,tsan)),)
sanitize-threads:
	@echo "ThreadSanitizer was left out: it needs g++, clang++ and clang's OpenMP (apt-get install g++ clang libomp-dev)"
else
sanitize-threads: $(VENV)/installed
	CC=clang CXX=clang++ LDSHARED="clang -shared" LDCXXSHARED="clang++ -shared" CFLAGS=-fsanitize=thread \
		CXXFLAGS=-fsanitize=thread LDFLAGS=-fsanitize=thread FUSED_OPTIM_BUILD=cpu \
		$(BIN)/python setup.py -q build --build-base build/threads --build-lib build/threads/lib
	nm -D build/threads/lib/fused_optim/_cpu.*.so | grep -q __tsan
	LD_PRELOAD="$(call SANITIZER,tsan) $(dir $(LLVM))libomp.so" OMP_TOOL_LIBRARIES=$(LLVM) \
		TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider -o pythonpath="build/threads/lib tests ." $(THREADED)
endif

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! git grep -nE '^(<<<<<<<|>>>>>>>)'

check: $(VENV)/installed
	$(BIN)/python -m fused_optim

# What the benchmark compares with, as far as the index has it. DeepSpeed builds with the torch
# that is there.
$(VENV)/peers: pyproject.toml | $(VENV)/installed
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'], sep='\n')" > $(VENV)/peers.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -r $(VENV)/peers.txt
	touch $@

bench: $(VENV)/installed $(VENV)/peers
	$(BIN)/python -m bench all --out bench_output

# With the machine's own Python: an image for a GPU has a torch that fits it, and perhaps no network.
gpu-check:
	$(PYTHON) -m bench gpu-check

$(VENV)/studies: $(VENV)/installed
	$(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e ".[studies]"
	touch $@

# Training is in processes of one thread; what is finished is not done again.
studies: $(VENV)/studies
	OMP_NUM_THREADS=1 $(BIN)/python -m studies fidelity
	$(BIN)/python -m studies training

clean:
	rm -rf $(VENV) $(STACKS) .venv-torch-* build dist *.egg-info fused_optim/*.so demo_output bench_output gpu_check_output
