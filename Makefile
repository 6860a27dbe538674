# Everything here runs in .venv, which the first target makes by itself, or, with PY=..., in that interpreter as it is.
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
EXPERIMENT ?= quickstart
ARGS ?=

INSTALLED := $(if $(filter file,$(origin PY)),$(VENV)/.installed)
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
# Fashion-MNIST is fetched before a training, unless ARGS names other data.
OTHER_DATA := $(filter-out data=fashion_mnist,$(filter data=% data.path=% debug=%,$(ARGS)))
DATA := $(if $(OTHER_DATA),,data)

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-slurm lint format types data bench record gpu gpu-wheels faults notebook sweep clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo '  Overrides go into ARGS, presets into EXPERIMENT: make train EXPERIMENT=annotated ARGS="schedule=cosine seed=1"'

train: $(INSTALLED) $(DATA)  ## Train on Fashion-MNIST: garments in about ten minutes on two CPU cores
	$(PY) -m litdiffusion.train experiment=$(EXPERIMENT) $(ARGS)

test: $(INSTALLED) data  ## Run the tests (some minutes on two cores); ARGS="tests/nn -x" narrows them
	$(PY) -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED) data  ## Run the tests that take long
	$(PY) -m pytest -m 'slow and not slurm' $(PARALLEL) $(ARGS)

test-slurm: $(INSTALLED)  ## Run the tests on a real Slurm, which Debian packages: apt install slurm-wlm munge
	$(PY) -m pytest -m slurm $(ARGS)

lint: $(INSTALLED)  ## Check style and formatting
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(INSTALLED)  ## Mend style and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

types: $(INSTALLED)  ## Check types
	$(VENV)/bin/mypy

data: $(INSTALLED)  ## Fetch Fashion-MNIST, without root, into LITDIFFUSION_DATA or data/
	@$(PY) -m litdiffusion.data.fetch

bench: $(INSTALLED)  ## Measure the training step beside the blog's code and others
	$(PY) benchmarks/train_step.py --markdown docs/benchmarks.md $(ARGS)

record: $(INSTALLED) data  ## Train the blog's code, another library and ours, and score them: hours, continued where it stopped
	$(PY) benchmarks/record.py --markdown docs/benchmarks.md $(ARGS)
	$(PY) benchmarks/samplers.py --markdown docs/benchmarks.md --spacing karras $(patsubst %,logs/record/%/run,quickstart fashion_mnist annotated)

gpu: $(INSTALLED)  ## Run all that needs a GPU, in eight minutes: docs/gpu.md; ARGS=--dry-run tries it on the CPU
	$(PY) benchmarks/gpu.py $(ARGS)

gpu-wheels: $(INSTALLED)  ## Download the packages that make gpu needs on a machine without a network
	$(PY) benchmarks/gpukit/wheels.py $(ARGS)

faults: $(INSTALLED)  ## Interrupt real runs 25 times and compare them with uninterrupted runs; ARGS="--times 4"
	$(PY) tests/faults.py $(ARGS)

notebook: $(INSTALLED) data  ## Execute the notebooks in place
	cd notebooks && ../$(VENV)/bin/jupyter execute --inplace *.ipynb

sweep: $(INSTALLED) $(DATA)  ## Train every schedule with every loss, and compare; repeated, what is not finished
	$(PY) -m litdiffusion.train experiment=$(EXPERIMENT) sweep=schedules_and_losses $(ARGS)

clean:  ## Remove caches and the virtual environment; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: this needs Python 3.11 or later; name one: make PYTHON=python3.12' >&2; exit 2; }
	@echo 'Making the virtual environment in $(VENV): torch and its libraries are several GB, this takes some minutes.'
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'error: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv' >&2; exit 2; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
