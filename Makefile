# make demo    train a Llama on four processes (or all GPUs), and compare with one process
# make test    the tests                make lint    ruff and pyright
# make test-ops  sharding rules over all of PyTorch's own samples of its ops
# make bench   side by side with peers, planning times, memory of materialization
#
# Each sets up .venv first, once; `make PYTHON=python3.12 ...` picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

export HF_HUB_OFFLINE := 1
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-ops lint bench setup clean

demo: $(INSTALLED)
	@$(BIN)/python examples/run_demo.py

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadgroup

test-ops: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --ops tests/passes/test_opinfo.py

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --quiet --check . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/basedpyright --project . --pythonpath $(BIN)/python

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.peers
	@$(BIN)/python -m benchmarks.plan_time --model llama3-8b --devices 64
	@$(BIN)/python -m benchmarks.plan_limits
	@$(BIN)/python -m benchmarks.materialize
	@$(BIN)/python -m benchmarks.single_gpu

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("shardwright needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	@echo "setting up .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "installing shardwright, torch and test tools into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,hf]' --constraint constraints.txt
	@touch $@
	@echo "installed $$($(BIN)/python -c 'import torch; print("torch", torch.__version__)')"

clean:
	rm -rf .venv build dist demo-output *.egg-info
