# make sweep: install, then the first sweep.   make check: format, lint, types.
# make test: install, then the tests without and with tiny models.   make test-all: those with servers and processes, too.
# make docs: the pages that are made from the code.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: sweep test test-all test-slow check docs clean
sweep: .venv/installed
	$(BIN)/python -m lorasweep -m lora.r=8,16,64

# A file's tests stay on one core: they share its fixtures and its solo runs. Files with most tests go first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

test: .venv/installed
	$(PYTEST) -m "(unit or train) and not slow and not gpu"

test-all: .venv/installed
	$(PYTEST)

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --durations=10

check: .venv/installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: .venv/installed
	$(BIN)/python docs/generate.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
