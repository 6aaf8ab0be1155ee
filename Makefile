# Two commands for everyone: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help env demo test test-all bench fixtures check format clean

help:
	@echo "make demo      train a small model three ways, compare, draw (about 10 minutes)"
	@echo "make test      the test suite, without what is marked slow"
	@echo "make test-all  the whole test suite"
	@echo "make bench     measure against peers; writes docs/benchmarks.md"
	@echo "make fixtures  make the test fixtures of other libraries anew (MAKERS=\"...\" for some)"
	@echo "make check     lint, format and type checks"
	@echo "make format    put the code into the house's format"

env: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wda needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	$(BIN)/wda demo

test: env
	$(BIN)/pytest -m "not slow"

test-all: env
	$(BIN)/pytest

bench: env
	$(BIN)/python benchmarks/run.py

fixtures:
	$(PYTHON) tests/fixtures/make.py $(MAKERS)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
