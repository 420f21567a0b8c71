# Needs make and Python 3.11 or newer with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DEMO_OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread in each process: on small models more threads cost more than they bring.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: help setup test stress demo lint typecheck docs wheel bench gpu clean

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## install matta with everything into .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); matta needs Python 3.11 or newer:" \
			"make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

test: $(READY) ## all tests, the examples in docstrings and README included
	$(TESTS)

stress: $(READY) ## the tests left out of `make test`, and generated cases by the thousand
	$(TESTS) -m "stress or not stress" --hypothesis-profile=stress

demo: $(READY) ## the relevance study on real data with few seeds
	$(BIN)/matta study relevance --demo --seeds 3 --out $(DEMO_OUT)

lint: $(READY) ## ruff: rules, import order and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(READY) ## mypy
	$(BIN)/mypy

docs: $(READY) ## the documentation site, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(READY) ## build the wheel into dist/, and run an example with it alone in a fresh venv
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(BIN)/python -m venv $$fresh && \
	$$fresh/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl && \
	cp examples/plain_loop.py $$fresh && cd $$fresh && bin/python -I plain_loop.py && bin/matta study relevance --help >/dev/null

bench: $(READY) ## every benchmark, one after the other
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

gpu: $(READY) ## what matta does on this machine's GPU, as JSON; at tiny sizes without one
	@$(BIN)/python benchmarks/gpu.py --json

clean: ## remove .venv and what the tools have left (runs/ stays)
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src studies tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
