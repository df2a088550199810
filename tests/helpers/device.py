"""Where tests of the native library compute: on the CPU, with all layers on a GPU, or on a worker of this machine."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
from typing import Any

from clex_local.library.devices import devices_with
from clex_local.library.loading import load_ggml
from helpers.workers import Worker

# `make test-worker` sets this. A worker's memory can no more be read in place than a GPU's, and it needs no hardware.
ON_WORKER = bool(os.environ.get("CLEX_TEST_WORKER"))
# `make test-device` sets this, with which benchmarks/gpu_check.sh begins.
GPU_LAYERS = -1 if ON_WORKER else int(os.environ.get("CLEX_TEST_GPU_LAYERS", "0"))


@functools.cache
def workers() -> tuple[str, ...]:
    """The addresses of the workers, of which there is one for each process of the tests, or none."""
    if not ON_WORKER:
        return ()
    worker = Worker()
    atexit.register(worker.kill)
    return (worker.address,)


def llama_arguments() -> dict[str, Any]:
    """Arguments of ``Llama`` that say where it computes."""
    return {"n_gpu_layers": GPU_LAYERS, "rpc": workers()}


def model_params() -> dict[str, Any]:
    """The same as fields of ``llama_model_params``."""
    if not ON_WORKER:
        return {"n_gpu_layers": GPU_LAYERS}
    return {"n_gpu_layers": GPU_LAYERS, "devices": ctypes.addressof(_devices())}


def cpu_alone() -> dict[str, Any]:
    """The CPU as such fields: not even products of long prompts go to a GPU, as they do with no layer on one."""
    return {"n_gpu_layers": 0, "devices": ctypes.addressof(_NOTHING)}


_NOTHING = (ctypes.c_void_p * 1)(None)


@functools.cache
def _devices() -> ctypes.Array[ctypes.c_void_p]:
    return devices_with(workers())


def description() -> str:
    """The device's name, for the head of a report."""
    if ON_WORKER:
        return "all layers on a worker of this machine"
    if not GPU_LAYERS:
        return "the CPU"
    base = load_ggml()
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    devices = [base.ggml_backend_dev_description(device).decode() for device in devices_with(()) if device]
    return f"{GPU_LAYERS if GPU_LAYERS > 0 else 'all'} layers on {', '.join(devices) or 'a GPU, and there is none'}"
