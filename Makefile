PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2-135m
RUN ?= runs/$(notdir $(MODEL))
BIN = $(VENV)/bin

.PHONY: report test test-slow lint gallery bench clean

report: $(VENV)/ready
	$(BIN)/ffnprobe report $(MODEL) --out $(RUN)

test: $(VENV)/ready
	$(BIN)/pytest

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gallery: $(VENV)/ready
	for script in analyses/plot_*.py; do $(BIN)/python $$script $(MODEL) || exit 1; done

bench: $(VENV)/ready
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/executors.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
