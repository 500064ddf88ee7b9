.PHONY: check test bench results

PYTHON ?= python
CUDA_SOURCES := $(foreach folder,csrc tests/emulation,$(wildcard $(addprefix $(folder)/*.,cu cuh h cpp)))

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(CUDA_SOURCES),clang-format --dry-run --Werror $(CUDA_SOURCES))

test:
	$(PYTHON) -m pytest -n 2

bench:
	$(PYTHON) -m pytest benchmarks --benchmark-only

# of a checkout without changes, on a machine that does nothing else: the file, its picture, the README's table
results:
	$(PYTHON) -m benchmarks run --suite quick --budget 120 --keep --note "$(NOTE)"
	$(PYTHON) -m benchmarks report --readme
