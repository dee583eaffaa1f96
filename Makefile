PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= outputs/digits

.DEFAULT_GOAL := help
.PHONY: help env demo study test test-all test-soak test-gpu test-oldest test-timm check fields docs dist format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

env: $(VENV)/.installed ## Create the environment in .venv

demo: env ## Run BiSSL on the embedded digits (3 to 10 minutes on 2 cores)
	$(BIN)/bissl-hf demo --output_dir $(DEMO_OUTPUT) --resume_from_checkpoint true $(ARGS)

study: env ## Make the tables and figures of docs/results.md from the raw results beside it
	for folder in docs/results/*/; do \
		$(BIN)/python recipes/study.py --report_only true --output_dir $$folder || exit 1; done

test: env ## Run the tests (no network, no GPU)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: env ## Run the tests, the slow ones included
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not soak and not gpu and not network and not timm' $(ARGS)

test-soak: env ## Run the chains of faults: kills at random moments and disks that fail
	$(BIN)/python -m pytest -n 2 -m soak $(ARGS)

test-gpu: ## Run the tests that need a GPU, in the environment of $(PYTHON), whose torch has CUDA
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(PYTHON) -m pytest -m gpu $(ARGS)

.venv-timm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 --editable '.[dev,timm]'
	@touch $@

test-timm: .venv-timm/.installed ## Run the tests that need timm, in .venv-timm (with torchvision; several GB)
	.venv-timm/bin/python -m pytest -m timm tests/models/test_timm.py $(ARGS)

test-oldest: .venv-oldest/.installed ## Run the tests with the oldest versions that are supported, in .venv-oldest
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

check: env ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without torch and this package: the pages are made from the source as text.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --requirement .venv-docs/requirements.txt
	@touch $@

fields: env ## Make docs/fields.md, the fields of all commands, from the package
	$(BIN)/python -m tests.docs.fields_page

docs: .venv-docs/.installed ## Build the documentation into site/, every warning an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet --site-dir site

dist: env .venv-docs/.installed ## Build the source archive and the wheel into dist/, and run the demo from the wheel
	rm -rf build dist
	.venv-docs/bin/python -m build --outdir dist
	.venv-docs/bin/twine check --strict dist/*
	.ci/check_wheel $(BIN)/python dist/*.whl

format: env ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environments and the caches
	rm -rf $(VENV) .venv-oldest .venv-timm .venv-docs .mypy_cache .pytest_cache .ruff_cache build dist site *.egg-info
