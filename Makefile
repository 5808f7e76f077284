# make demo and make test are all a fresh machine needs: they make .venv and install into it what they use, once.
.PHONY: help demo demo-translation demo-detection test bench lint format clean

PYTHON_IN_VENV := .venv/bin/python
SETUP_INPUTS := .ci/setup pyproject.toml constraints.txt requirements-fairseq.txt setup.py $(wildcard core/masks/*.cpp)

help:
	@echo "make demo              train dense, STE, SR-STE and ASP on digits; table, curves, verified checkpoint (5 min)"
	@echo "make demo-translation  sparse Transformer, from raw text to BLEU (8 min)"
	@echo "make demo-detection    sparse Mask R-CNN, to box and mask AP (10 min)"
	@echo "make test              all tests"
	@echo "make bench             the benchmarks that run on this machine"
	@echo "make lint              ruff and mypy"

.venv/.%: $(SETUP_INPUTS)
	@.ci/setup $*

demo: .venv/.classification
	@$(PYTHON_IN_VENV) -m nm_sparsity.classification.demo

demo-translation: .venv/.translation
	@$(PYTHON_IN_VENV) -m nm_sparsity.translation.demo

demo-detection: .venv/.detection
	@$(PYTHON_IN_VENV) -m nm_sparsity.detection.demo

bench: .venv/.benchmarks
	@$(PYTHON_IN_VENV) -m nm_sparsity.benchmarks

test: .venv/.dev
	@$(PYTHON_IN_VENV) -m pytest

lint: .venv/.dev
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy

format: .venv/.dev
	@$(PYTHON_IN_VENV) -m ruff check --fix .
	@$(PYTHON_IN_VENV) -m ruff format .

clean:
	rm -rf .venv build dist runs *.egg-info
