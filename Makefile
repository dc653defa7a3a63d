# make demo: the whole pipeline on built-in data.  make test: the test suite.
# make compile-check: the CUDA kernels for a GPU that nobody here has (part of make test).
# make bench: speed against plain PyTorch; fails where a committed ratio got worse.
# RECORD=FILE writes the ratios.
# All create .venv first, with the torch that runs on the GPU found here (none: the CPU build).

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin

.PHONY: install demo test lint compile-check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py tools/choose_stack.py tools/native_build.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) tools/choose_stack.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all,test]"
	touch $@

demo: install
	$(BIN)/lgcnet run --preset smoke --out $(RUN)

test: install lint compile-check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

bench: install
	$(BIN)/python -m pytest bench/guard -q -rs --benchmark-quiet $(if $(RECORD),--record $(RECORD))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every CUDA kernel for the Titan Xp, without a GPU; NVRTC apart from the one that torch pins.
compile-check: $(VENV)/compile-check/.installed
	$(VENV)/compile-check/bin/python tools/compile_check.py

$(VENV)/compile-check/.installed: | install
	$(PYTHON) -m venv $(VENV)/compile-check
	$(VENV)/compile-check/bin/python -m pip install --quiet --disable-pip-version-check "nvidia-cuda-nvrtc-cu12==12.9.*"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
