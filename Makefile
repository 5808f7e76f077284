# make demo and make test are all a fresh machine needs: they make .venv and install into it what they use, once.
.PHONY: help demo demo-translation demo-detection bench test test-fast test-oldest lint format docs clean

PYTHON_IN_VENV := .venv/bin/python
PYTHON_OLDEST ?= python3.12
SETUP_INPUTS := .ci/setup pyproject.toml $(wildcard constraints*.txt) requirements-fairseq.txt setup.py $(wildcard core/masks/*.cpp)

help:
	@echo "make demo              five methods on a hundred digits; table, curves, verified checkpoint (5 min)"
	@echo "make demo-translation  sparse Transformer, from raw text to BLEU (8 min)"
	@echo "make demo-detection    sparse Mask R-CNN, to box and mask AP (10 min)"
	@echo "make bench             the benchmarks that run on this machine"
	@echo "make test              all tests, in two processes (13 to 25 min on two cores)"
	@echo "make test-fast         those that are not marked slow (2 min)"
	@echo "make test-oldest       core and benchmarks with the oldest supported versions (PYTHON_OLDEST=python3.12)"
	@echo "make lint              ruff and mypy"
	@echo "make docs              the documentation as a site, in site/"

.venv/.%: $(SETUP_INPUTS)
	@.ci/setup $*

.venv-oldest/.%: $(SETUP_INPUTS)
	@PYTHON=$(PYTHON_OLDEST) .ci/setup $* .venv-oldest constraints-oldest.txt

demo: .venv/.classification
	@$(PYTHON_IN_VENV) -m nm_sparsity.classification.demo

demo-translation: .venv/.translation
	@$(PYTHON_IN_VENV) -m nm_sparsity.translation.demo

demo-detection: .venv/.detection
	@$(PYTHON_IN_VENV) -m nm_sparsity.detection.demo

bench: .venv/.benchmarks
	@$(PYTHON_IN_VENV) -m nm_sparsity.benchmarks

test: .venv/.dev
	@OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --hypothesis-profile=ci

test-fast: .venv/.dev
	@OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --hypothesis-profile=ci -m "not slow"

test-oldest: .venv-oldest/.test
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/core tests/experiments tests/benchmarks

lint: .venv/.dev
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy

format: .venv/.dev
	@$(PYTHON_IN_VENV) -m ruff check --fix .
	@$(PYTHON_IN_VENV) -m ruff format .

docs: .venv/.docs
	@NO_MKDOCS_2_WARNING=1 $(PYTHON_IN_VENV) -m mkdocs build --quiet

clean:
	rm -rf .venv .venv-oldest .venv*.lock build dist site *.egg-info
