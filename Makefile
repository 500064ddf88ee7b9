.PHONY: check test bench

PYTHON ?= python
CUDA_SOURCES := $(foreach folder,csrc tests/emulation,$(wildcard $(addprefix $(folder)/*.,cu cuh h cpp)))

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(CUDA_SOURCES),clang-format --dry-run --Werror $(CUDA_SOURCES))

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) -m pytest benchmarks --benchmark-only
