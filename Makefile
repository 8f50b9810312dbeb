# make demo     install, train both models on this Python's own documentation, and search it
# make test     install and run the tests
# make install  only install, into .venv; repeated when pyproject.toml or constraints-cpu.txt changes
# make lint     ruff and mypy

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: install demo test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints-cpu.txt -e '.[demo,dev]'
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/tandemqa demo --out $(OUT)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
