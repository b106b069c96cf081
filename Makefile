# Two commands do all the set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS := .venv/.docs

.PHONY: quickstart test test-slow test-faults verify-resume lint docs format install clean

$(STAMP): requirements.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -e ".[dev,parquet]"
	touch $(STAMP)

# Sphinx, for `make docs` alone.
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $(DOCS)

install: $(STAMP)

# Train a two-stage cascade on built-in data, offline, and look at what it draws.
quickstart: $(STAMP)
	$(BIN)/imagen-lightning quickstart

# One process a core, one thread a process.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow and not faults"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# The long forms: hundreds of kills, thousands of injected faults. -s shows their figures.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -q -s -m faults

# Kill, resume, compare: on this machine, with the configuration and options of your own, e.g.
# make verify-resume CONFIG=mine.yaml ARGS="--workers 0,4 --data.init_args.batch_size 8"
CONFIG ?= experiments/quickstart/base.yaml
verify-resume: $(STAMP)
	$(BIN)/imagen-lightning verify-resume --config $(CONFIG) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

# The pages in build/docs/index.html, all anew; a warning is an error. Needs no network once Sphinx is installed.
docs: $(DOCS)
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
