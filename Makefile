# make demo · make test · make check · make bench · make shaders · make wheel · make exactness: each does all the set-up it needs; a second call is quick.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do command -v $$p >/dev/null && \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
NATIVE := CMakeLists.txt pyproject.toml $(wildcard vkllm/vk/native/*)
SHADERS := $(shell find codegen shaders -name '*.py') tools/build_shaders.py vkllm/kernels.py
MODEL ?= tiny

.PHONY: demo test check bench shaders wheel exactness setup clean

demo: .venv/run.stamp
	$(BIN)/vkllm run tiny -p "Once upon a time" -n 120

test: .venv/test.stamp
	$(BIN)/python -m pytest $(ARGS)

check: .venv/check.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: .venv/run.stamp
	$(BIN)/python bench/run.py $(MODEL) $(if $(PEER),--peer $(PEER)) $(if $(PEER_VULKAN),--peer-vulkan $(PEER_VULKAN)) $(ARGS)

# Kernels of common models for the wheel, with a list of them to commit; and every kind of kernel as SPIR-V, its text and GLSL.
shaders: vkllm/kernels.zip
	$(BIN)/vkllm shaders build/shaders

vkllm/kernels.zip: $(SHADERS) | .venv/run.stamp
	$(BIN)/python tools/build_shaders.py

wheel: vkllm/kernels.zip
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

exactness: .venv/oracle.stamp
	$(BIN)/python tools/exactness.py

setup: .venv/test.stamp .venv/check.stamp

.venv/bin/python:
	@sh tools/setup.sh build "$(PYTHON)"
	$(PYTHON) -m venv .venv

# The package is installed in editable form: a change of Python code needs no set-up, one of C++ or the metadata does.
.venv/run.stamp: $(NATIVE) | .venv/bin/python
	@sh tools/setup.sh build "$(PYTHON)"
	$(PIP) install "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.20" "ninja>=1.11"
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) install --no-build-isolation --editable .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	@sh tools/setup.sh test "$(PYTHON)"
	$(PIP) install "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100" "httpx>=0.27" "openai>=1.40" "selenium>=4.20" "fastapi>=0.110" "uvicorn>=0.36" "websockets>=13" "prometheus-client>=0.20" "llguidance>=1.0"
	@touch $@

.venv/check.stamp: .venv/test.stamp
	$(PIP) install "ruff>=0.6" "mypy>=1.11"
	@touch $@

# The oracles: several GB where pip finds no CPU build of torch; llama-cpp-python is compiled (10 minutes on 2 cores).
.venv/oracle.stamp: .venv/test.stamp
	$(PIP) install "torch>=2.2" "transformers>=5" "onnx>=1.17" "onnxscript>=0.2" "onnxruntime>=1.20" "llama-cpp-python>=0.3.16"
	@touch $@

clean:
	rm -rf build dist .venv vkllm/kernels.zip
