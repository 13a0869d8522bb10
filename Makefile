# Dreamscale: `make demo` and `make test` on a fresh machine; each makes .venv and installs what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Processes that share the tests, file by file.
WORKERS ?= 2
SOURCES := data_sharding pretrain finetune launch tests benchmarks

.PHONY: demo test check lint types spelling format clean
.DEFAULT_GOAL := test

# torch comes first and pinned: an unpinned torch asked for by another package pulls gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dreamscale demo --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: lint types spelling test

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed
	$(BIN)/basedpyright

spelling: $(VENV)/.installed
	$(BIN)/codespell $(SOURCES) configs docs README.md CONTRIBUTING.md

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
