VENV ?= .venv
PYTHON ?= python3
KARMMA = $(VENV)/bin/karmma
PYTEST = $(VENV)/bin/python -m pytest

.PHONY: demo test test-slow lint

demo: $(VENV)/installed
	$(KARMMA) demo

test: $(VENV)/installed lint
	$(PYTEST)

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[test]"
	touch $@
