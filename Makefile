PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2-135m
BIN = $(VENV)/bin

.PHONY: report test test-slow lint gallery bench clean

# where the default model cannot be fetched (exit code 4), the one that comes with ffnprobe takes its place
report: $(VENV)/ready
	@model='$(MODEL)'; \
	if [ '$(origin MODEL)' = file ]; then \
		$(BIN)/ffnprobe fetch $$model > /dev/null; code=$$?; \
		case $$code in \
			0) ;; \
			4) model=tiny-x4; echo "$(MODEL) could not be fetched: measuring $$model, which comes with ffnprobe" >&2 ;; \
			*) exit $$code ;; \
		esac; \
	fi; \
	$(BIN)/ffnprobe report $$model $(if $(RUN),--out '$(RUN)')

test: $(VENV)/ready
	$(BIN)/pytest -n 2

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the family, planted facts and edits bring their own models
FAMILY = analyses/plot_expansion.py analyses/plot_claims_family.py analyses/plot_contraction_family.py \
	analyses/plot_quantization_family.py analyses/plot_recall.py analyses/plot_memory_edit.py

gallery: $(VENV)/ready
	for script in $(filter-out $(FAMILY),$(wildcard analyses/plot_*.py)); do $(BIN)/python $$script $(MODEL) || exit 1; done
	for script in $(FAMILY); do $(BIN)/python $$script || exit 1; done

bench: $(VENV)/ready
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/executors.py
	$(BIN)/python benchmarks/clustering.py
	$(BIN)/python benchmarks/reading.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
