# make serve | install | test | check | sim | fuzz | faults | exactness | soak | audit | bench | paper | paper-gpu | asan | cuda | clean: each makes .venv first and needs only Python 3.10-3.12 and g++.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup serve install test check sim fuzz faults exactness soak audit bench paper paper-gpu asan cuda clean setup-serve setup-test setup-bench

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
  $$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && exit; done; echo python3)
TORCH ?=
CUDA ?=
HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
MODEL ?=
BACKENDS ?= /opt/tritonserver/backends
NAME ?= pagedcore
SEEDS ?= 100000
TRITONSERVER ?=
ARGS ?=
BENCHMARKS ?= $(addprefix benchmarks/,engine/host_step.py engine/cpu_graphs.py engine/cpu_engine.py engine/busy_neighbour.py \
  kernels/cpu_linear.py kernels/cpu_attention.py server/cpu_server.py tables.py)
ASAN_TESTS ?= tests/core tests/kernels

VENV_BIN := .venv/bin
SETUP = @command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev" >&2; exit 1; }; \
  $(PYTHON) scripts/setup_environment.py --torch '$(TORCH)' --cuda '$(CUDA)' --extras

help:
	@echo "make serve   serve a model with tritonserver (MODEL=folder HOST= HTTP_PORT= GRPC_PORT= METRICS_PORT= TRITONSERVER=)"
	@echo "make install put the backend into an installed tritonserver (BACKENDS=/opt/tritonserver/backends NAME=vllm|pagedcore)"
	@echo "make test    the test suite, without slow tests (ARGS='-k name' goes to pytest)"
	@echo "make check   ruff, mypy, clang-format"
	@echo "make sim     the engine in a simulated world, $(SEEDS) seeds (SEEDS= ARGS='--seconds 60'); a failing one is made small and shown"
	@echo "make fuzz    random requests to the parser and to a server (ARGS='--cases 10000 --server-cases 500'); a faulty one is made small and shown"
	@echo "make faults  what goes wrong in service, one after the other, and what comes of it"
	@echo "make exactness  tokens, logits and their bits against transformers and under many schedules"
	@echo "make soak    100,000 mixed requests to a server, and what they leave behind (ARGS='--requests 5000 --overload 10')"
	@echo "make audit   known vulnerabilities of what serving installs, by pip-audit (ARGS='--advisories FOLDER' without a network)"
	@echo "make bench   the CPU benchmarks, written to benchmarks/results"
	@echo "make paper   the PagedAttention paper's experiments that need no GPU, written to docs/paper.md"
	@echo "make paper-gpu  those that need one, part by part in at most 9 minutes (ARGS='--part fig12 --minutes 5'); 'make paper' draws them"
	@echo "make asan    block manager and kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make cuda    compile the CUDA kernels, which needs nvcc and no GPU; 'make test CUDA=ON ARGS=\"-m gpu\"' runs their tests on one"
	@echo "make setup   only what the others need: .venv (PYTHON= TORCH= CUDA=ON|OFF), tritonserver and the default model"

setup-serve:
	$(SETUP) serve
setup-test:
	$(SETUP) test,check
setup-bench:
	$(SETUP) bench

setup: setup-serve
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'

serve: setup-serve
	@exec $(VENV_BIN)/python -m pagedcore.serve --model '$(MODEL)' --host '$(HOST)' --http-port '$(HTTP_PORT)' \
	  --grpc-port '$(GRPC_PORT)' --metrics-port '$(METRICS_PORT)' --tritonserver '$(TRITONSERVER)'

install: setup-serve
	@$(VENV_BIN)/python -m pagedcore.serve.install_backend --backends '$(BACKENDS)' --name '$(NAME)'

test: setup-test
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'
	$(VENV_BIN)/python -m pytest -q $(ARGS)

check: setup-test
	$(VENV_BIN)/ruff check .
	$(VENV_BIN)/ruff format --check .
	$(VENV_BIN)/mypy
	$(VENV_BIN)/python -m pytest -q tests/test_layering.py
	$(VENV_BIN)/python benchmarks/tables.py --check
	$(VENV_BIN)/python benchmarks/paper/page.py --check
	git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs $(VENV_BIN)/clang-format --dry-run --Werror

sim: setup-test
	$(VENV_BIN)/python -m tests.simulation --seeds $(SEEDS) $(ARGS)

fuzz: setup-test
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'
	$(VENV_BIN)/python -m tests.fuzz $(ARGS)

faults: setup-test
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'
	$(VENV_BIN)/python -m tests.faults $(ARGS)

exactness: setup-test
	$(VENV_BIN)/python -m tests.exactness $(ARGS)

soak: setup-bench
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'
	$(VENV_BIN)/python -m tests.soak $(ARGS)

audit: setup-test
	$(VENV_BIN)/python -m tests.audit $(ARGS)

bench: setup-bench
	@$(VENV_BIN)/python -m pagedcore.serve --prepare --tritonserver '$(TRITONSERVER)'
	set -e; for script in $(BENCHMARKS); do $(VENV_BIN)/python $$script; done

paper: setup-bench
	$(VENV_BIN)/python benchmarks/paper/main.py

paper-gpu: setup-bench
	$(VENV_BIN)/python -m benchmarks.paper.gpu $(ARGS)

# The instrumented modules live in a tree of their own, put before site-packages by -S, which leaves out .pth files.
ASAN_TREE := build/asan/tree
asan: setup-test
	cmake=$(CURDIR)/$(VENV_BIN)/cmake; $$cmake -S . -B build/asan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV_BIN)/ninja -DPAGEDCORE_SANITIZE=ON -DPAGEDCORE_CUDA=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(VENV_BIN)/python -Dpybind11_DIR=$$($(VENV_BIN)/python -m pybind11 --cmakedir) \
	  && $$cmake --build build/asan
	rm -rf $(ASAN_TREE) && mkdir -p $(ASAN_TREE) && cp -r pagedcore kernels tests pyproject.toml $(ASAN_TREE)
	$(VENV_BIN)/cmake --install build/asan --prefix $(ASAN_TREE)
	site=$$($(VENV_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && cd $(ASAN_TREE) && \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$$site \
	  $(CURDIR)/$(VENV_BIN)/python -S -m pytest -q -p no:cacheprovider --capture=sys $(ASAN_TESTS) $(ARGS)

cuda: setup-test
	cmake=$(CURDIR)/$(VENV_BIN)/cmake; $$cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV_BIN)/ninja \
	  -DPAGEDCORE_CUDA=ON -DPython_EXECUTABLE=$(CURDIR)/$(VENV_BIN)/python \
	  -Dpybind11_DIR=$$($(VENV_BIN)/python -m pybind11 --cmakedir) && $$cmake --build build/cuda --target _kernels

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
