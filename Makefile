# Everything is set up on the first call: needs Python 3.11 and make, nothing else.
#
#   make quickstart   the story of the README on real models: about 5 minutes on two cores (FULL=1: more comparisons;
#                     TASK=ner, images, recommend, instruct or translate: another story)
#   make test         the tests; short forms of the proofs are among them
#   make prove        the proofs that take over a minute each
#   make check        format, lint, types, import contracts, protos, generated files, sizes
#   make protos       regenerate the generated code
#   make gpu          all that needs a GPU, with the Python at hand: no package index, no Ray; under 8 minutes
#   make bench        side by side with other ways, written into docs/benchmarks.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Another set of pins is another stamp, whatever the files' times say.
INSTALLED := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test prove gpu check format protos reference bench release-protos clean

help:
	@sed -n '3,11p' Makefile | cut -c3-

# Two workers share the cores: a thread that waits for another must not spin meanwhile.
test prove: export OMP_WAIT_POLICY := PASSIVE

setup: $(INSTALLED)

# torch first and by itself: the pinned build without CUDA; what comes after takes it as it is.
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shardyard needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || { echo "Setting up $(VENV) (once, a minute or two) ..."; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@$(PIP) install --constraint constraints.txt hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $@

quickstart: $(INSTALLED)
	@$(BIN)/python examples/quickstart/run.py $(if $(FULL),--full) $(if $(FALLBACK),--fallback) $(if $(TASK),--task $(TASK))

# STORE=postgresql: the stores of all tests are in a private PostgreSQL server.
test prove: export SHARDYARD_TEST_STORE := $(or $(STORE),sqlite)

# TESTS narrows it: make test TESTS=tests/unit. Three files at a time on two cores: many tests wait for processes to start.
test: $(INSTALLED)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not prove" --durations=10 $(TESTS)

# What a proof prints, its figures, is shown at the end (-P).
prove: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m prove -raP --durations=0 $(TESTS)

# Of machines with a GPU few reach a package index: whatever Python is at hand has to do. WRITE=1: into docs/benchmarks.md.
gpu:
	@PYTHONPATH=client:trainer $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py $(if $(WRITE),--write)

check: $(INSTALLED)
	@$(BIN)/python tools/check.py

format: $(INSTALLED)
	@$(BIN)/ruff format && $(BIN)/ruff check --fix

protos: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py client

# The tables of docs/ that are generated from the code, and the sync twin of the SDK.
reference: $(INSTALLED)
	@$(BIN)/python tools/reference.py
	@$(BIN)/python client/generate_sync.py

bench: $(INSTALLED)
	@$(BIN)/python bench/run.py

# At a release only: what `make check` compares the protos with from then on.
release-protos: $(INSTALLED)
	@$(BIN)/buf build protos --output protos/released.binpb

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
