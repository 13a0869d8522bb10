# `make demo` and `make test` work on a fresh machine: each creates .venv and installs the packages that it needs.

# `make` uses the first program in this list that runs and is Python 3.11, 3.12 or 3.13. To use another program, run
# `make PYTHON=/path/to/python`.
PYTHONS := python3.11 python3.12 python3.13 python3 python
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for name in $(PYTHONS); do $$name -c '$(SUITABLE)' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Number of processes that run the tests; each process runs whole test files.
WORKERS ?= 2
SOURCES := data_sharding pretrain finetune launch tests benchmarks setup.py

.PHONY: demo test test-python test-oldest resolve wheel check lint types spelling audit format clean
.DEFAULT_GOAL := test

# Install the pinned torch first: otherwise another package would install an unpinned torch with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "no Python 3.11 to 3.13 on the PATH; install one, or run 'make PYTHON=/path/to/python'" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dreamscale demo --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: lint types spelling test

# Run the tests that need no torch, in a small separate environment: make test-python PYTHON=python3.13
test-python:
	$(PYTHON) tests/python_versions.py test

# Run smoke tests with the oldest versions that pyproject.toml allows, in a separate environment.
test-oldest:
	$(PYTHON) tests/oldest_versions.py

# Check that pip finds every dependency for Python 3.11 to 3.13. `make resolve` downloads a few hundred MB.
resolve: $(VENV)/.installed
	$(BIN)/python tests/python_versions.py resolve

# Build the wheel for `pip install`: dist/dreamscale-VERSION-py3-none-any.whl.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed
	$(BIN)/basedpyright

spelling: $(VENV)/.installed
	$(BIN)/codespell $(SOURCES) configs docs README.md CONTRIBUTING.md

# List the published vulnerabilities of the installed packages. pip-audit runs in a separate environment. Needs the
# network.
audit: $(VENV)/.installed
	test -x build/audit/bin/pip-audit || { $(BIN)/python -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
