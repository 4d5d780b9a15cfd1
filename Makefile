# Two commands: `make demo` trains a sparse autoencoder on a language model in minutes, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch: the tested version; on Linux without an NVIDIA GPU its CPU build (a tenth of the size), from wherever pip is set up to find one,
# else from PyTorch's own index. Elsewhere the ordinary package is the right one.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
NEEDS_CPU_BUILD := $(shell test "$$(uname -s)" = Linux && ! nvidia-smi -L >/dev/null 2>&1 && echo yes)
KERNELS := $(wildcard src/lm_saes/ops/native/*.cpp src/lm_saes/ops/native/*.h) src/lm_saes/ops/native/build.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint types check figures clean

demo: $(VENV)/.installed
	$(BIN)/lm-saes demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

check: lint types test

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(NEEDS_CPU_BUILD),yes)
	$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu || $(PIP) "$(TORCH)"
else
	$(PIP) "$(TORCH)"
endif
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

figures: $(VENV)/.installed
	$(BIN)/python scripts/make_figures.py

clean:
	rm -rf $(VENV) build dist runs/demo
