# Two commands matter to a new user: `make tune` and `make test`. Both start from nothing.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: tune test test-slow real check gpu clean

tune: $(STAMP)
	$(VENV)/bin/paretune tune pocket --objective tpot --max-ppl-increase 1% --budget 270s -o runs/pocket --force
	$(VENV)/bin/paretune generate runs/pocket --prompt "The old man looked at the sea and" --max-new-tokens 60 --temperature 0.8 --top-p 0.95 --seed 1

test: $(STAMP)
	$(PY) -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(PY) -m pytest -m "slow and not gpu"
	$(MAKE) real

# The real model: fetched once, then held against transformers, the gguf package and llama.cpp. 15 minutes on two cores.
real: $(STAMP)
	$(VENV)/bin/paretune get smollm2
	$(PY) -m pytest -m real --durations=0 -rsP tests/real

# On a machine with a GPU: kernels are compiled and checked, then timed against the library's.
gpu: $(STAMP)
	$(PY) -m pytest -m gpu
	$(PY) benchmarks/gpu_kernels.py -o benchmarks/results/gpu_kernels.json

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m pytest tests/test_architecture.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build
