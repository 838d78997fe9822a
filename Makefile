# `make demo` and `make test` set up everything they need in .venv/. `make env` does only that.
#
#   PYTHON=python3.12 make env     another interpreter (default: python3)
#   make test ARGS="-k lora -x"    arguments for pytest (default: as many processes as cores, at most 8)

PYTHON ?= python3
ARGS ?= -n auto --maxprocesses 8 --dist loadfile
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# One thread per process: tests and the demo start several processes. No library may ask a hub for files.
ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A machine without an NVIDIA GPU takes PyTorch's CPU build (200 MB instead of 3 GB), if its index can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test lint env clean

demo: $(STAMP)
	@$(ENV) $(BIN)/hvtrain demo

test: $(STAMP)
	@$(ENV) $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

env: $(STAMP)

# torch first and alone: the others then take the build that is there.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv/ (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@index=; \
	if ! command -v nvidia-smi >/dev/null && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--index-url $(CPU_INDEX)"; fi; \
	$(PIP) -c constraints.txt $$index torch
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
