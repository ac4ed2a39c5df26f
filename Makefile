# Everything from a fresh machine with Python, a C++ compiler and make. Each step leaves a stamp file in the virtual
# environment and is taken again only when what it depends on has changed.

VENV ?= .venv
TORCH ?= 2.13.0
PYTHON ?= $(firstword $(foreach python,python3.11 python3,$(shell $(python) -c 'print("$(python)")' 2>/dev/null)) python3)

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check -q
tools := $(VENV)/.fastseq-tools
torch := $(VENV)/.fastseq-torch-$(TORCH)
built := $(VENV)/.fastseq-built
linters := $(VENV)/.fastseq-linters
peers := $(VENV)/.fastseq-peers
disassembler := $(VENV)/.fastseq-disassembler
sources := $(shell find csrc cmake -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.in') CMakeLists.txt setup.py pyproject.toml

.PHONY: help install gpu-check test demo bench lint format test-asan test-aarch64 test-faults cuda-test cuda-budget clean FORCE

help:
	@echo 'make demo          train a character language model with fastseq next to torch.nn'
	@echo 'make test          run the tests'
	@echo 'make bench         install the peers, and time fastseq next to them: tables, and a page with plots'
	@echo 'make install       build, and install into the virtual environment (all of the above do this first)'
	@echo 'make lint          check the style of the Python and C++ code; make format repairs it'
	@echo 'make test-asan     the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make cuda-test     the CUDA kernels, run on the CPU: their tests alone (make test has them, too)'
	@echo 'make cuda-budget   registers, spills, occupancy and instructions of the CUDA kernels, next to their table'
	@echo 'make test-faults   that the kernel tests see faults planted in the kernels (half an hour)'
	@echo 'make test-aarch64  the kernel tests, cross-compiled for aarch64 and run under qemu-user'
	@echo 'make gpu-check     on a machine with a GPU: build the CUDA kernels, run their tests and the benchmark'
	@echo 'make clean         remove everything that was built (the virtual environment stays)'
	@echo
	@echo 'PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) choose the interpreter, the virtual environment and the version of'
	@echo 'torch; ARGS="..." is passed on to pytest, demo and bench; MAX_JOBS and CXX to the build.'

install: $(built)

test: $(built)
	$(bin)/python -m pytest $(ARGS)

demo: $(built)
	$(bin)/python -m fastseq demo $(ARGS)

bench: $(peers)
	$(bin)/python -m fastseq bench $(if $(ARGS),$(ARGS),--quick --fresh)

lint: $(linters)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(bin)/clang-format --dry-run --Werror

format: $(linters)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(bin)/clang-format -i

# Build, tests and benchmark on a GPU; what they say is left in build/gpu-check.
gpu-check: $(torch)
	@$(bin)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo 'make gpu-check needs a GPU, and a torch in $(VENV) that was built with CUDA: see README.md.'; exit 1; }
	@mkdir -p build/gpu-check
	archs=$${FASTSEQ_CUDA_ARCHS:-$$($(bin)/python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')} && \
	FASTSEQ_CUDA=1 FASTSEQ_CUDA_ARCHS=$$archs $(pip) install --no-build-isolation -e '.[demo]' 'pytest>=8'
	$(bin)/python -m pytest tests/test_gpu.py $(ARGS) > build/gpu-check/tests.txt 2>&1; \
	    status=$$?; tail -n 30 build/gpu-check/tests.txt; exit $$status
	$(bin)/python -m fastseq bench-gpu --output build/gpu-check

# ---- Set-up ----------------------------------------------------------------------------------------------------------
$(tools):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'fastseq needs Python 3.10 or newer: choose one with PYTHON=/path/to/python3.'; exit 1; }
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	    { echo 'This Python cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv).'; exit 1; }
	$(pip) install 'setuptools>=77' cmake ninja
	@touch $@

$(torch): $(tools)
	@rm -f $(VENV)/.fastseq-torch-*
	$(bin)/python -m pip --disable-pip-version-check install torch==$(TORCH)
	@touch $@

$(built): $(torch) $(sources) build/made-for
	@echo 'Building fastseq: a minute or two the first time.'
	$(pip) install --no-build-isolation -e '.[demo,test]'
	@touch $@

$(peers): $(built)
	$(pip) install --no-build-isolation -e '.[demo,bench]'
	@touch $@

$(linters): $(built)
	$(pip) install --no-build-isolation -e '.[dev]'
	@touch $@

$(disassembler): $(tools)
	$(pip) install 'nvidia-cuda-nvdisasm==13.*'
	@touch $@

# The libraries lie in the tree, so another environment or another torch has to build them again.
build/made-for: FORCE
	@mkdir -p build
	@echo '$(abspath $(VENV)) torch $(TORCH)' | cmp -s - $@ || echo '$(abspath $(VENV)) torch $(TORCH)' > $@

# ---- The kernels alone, without torch ---------------------------------------------------------------------------------
# $(call kernel_tests,NAME,CMAKE OPTIONS)
define kernel_tests
	PATH='$(abspath $(bin))':"$$PATH" && \
	cmake -S . -B build/kernels-$(1) -G Ninja -DFASTSEQ_TORCH=OFF $(2) && \
	cmake --build build/kernels-$(1) && \
	ctest --test-dir build/kernels-$(1) --verbose
endef

test-faults: $(built)
	$(bin)/python -m pytest -m faults tests/test_faults.py tests/test_cuda_faults.py $(ARGS)

cuda-test: $(built)
	$(bin)/python -m pytest -v tests/test_cuda_emulation.py tests/test_cuda_faults.py tests/test_cuda_ptx.py $(ARGS)

cuda-budget: $(disassembler)
	PYTHONPATH=csrc/cuda $(bin)/python -m budget $(ARGS)

test-asan: $(tools)
	$(call kernel_tests,asan,-DFASTSEQ_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo)

test-aarch64: $(tools)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
	    { echo "$$tool is missing: install it (Debian: apt install g++-aarch64-linux-gnu qemu-user)."; exit 1; }; done
	$(call kernel_tests,aarch64,-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake)

clean:
	rm -rf build dist fastseq.egg-info fastseq/*.so .pytest_cache .ruff_cache .hypothesis
