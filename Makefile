VENV ?= .venv
PYTHON ?= python3
KARMMA = $(VENV)/bin/karmma
WORKERS ?= 2
# Two processes, each with whole files: most tests start processes of their own and wait for them.
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow lint types reproduce docs

demo: $(VENV)/installed
	$(KARMMA) demo

test: $(VENV)/installed lint
	$(PYTEST)

test-slow: $(VENV)/installed types
	$(PYTEST) -m slow

reproduce: $(VENV)/installed
	$(VENV)/bin/python bench/reproduce/run.py $(if $(QUICK),--quick)

docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .

# A minute on one core, so it goes with the slow tests.
types: $(VENV)/installed
	mkdir -p .venv/as && ln -sfn "$(CURDIR)" .venv/as/karmma
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[test]"
	touch $@
