"""What a model's layers can be computed on besides the CPU: GPUs here, and workers, which llama.cpp reaches by RPC."""

from __future__ import annotations

import ctypes
import functools
import re
import socket
from collections.abc import Sequence
from typing import Any

from clex_local.errors import ClexError
from clex_local.library.interrupt import asked_while_waiting, kept_until_return
from clex_local.library.loading import library_file, library_path, load_backends, load_ggml

_GPU, _INTEGRATED_GPU = 1, 2  # of enum ggml_backend_dev_type
_ADDRESS = re.compile(r"[^\s:,/]+:(\d{1,5})")


class WorkerError(ClexError):
    """A worker that cannot be used."""


def addresses(text: str) -> tuple[str, ...]:
    """The value of an option `rpc` in a command: ``host:port,host:port``.

    Raises:
        ValueError: it is something else.
    """
    found = tuple(part.strip() for part in text.split(","))
    for address in found:
        port = _ADDRESS.fullmatch(address)
        if port is None or not 0 < int(port[1]) < 2**16:
            raise ValueError(f"must be host:port, and commas between several, not {address!r}")
    return found


def has_gpu() -> bool:
    """Whether there is a GPU here that the library can compute on."""
    return bool(_local_gpus())


def devices_with(workers: Sequence[str]) -> ctypes.Array[ctypes.c_void_p]:
    """The devices for the layers of one model, as ``llama_model_params.devices`` wants them: workers, then GPUs here.

    Nothing is registered with llama.cpp, so that other models of this process are not computed by the workers.

    Args:
        workers: where they listen, ``host:port`` each.

    Raises:
        WorkerError: one cannot be reached, is given twice, or is no worker of this version.
    """
    check_workers(workers)
    base = load_ggml()
    found: list[int] = []
    for worker in workers:
        registered = _register(worker)
        count = base.ggml_backend_reg_dev_count(registered)
        found += [base.ggml_backend_reg_dev_get(registered, index) for index in range(count)]
    found += _local_gpus()
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def check_workers(workers: Sequence[str]) -> None:
    """Refuse what names no machine, and one worker under several addresses, which would wait for itself.

    Raises:
        WorkerError: there is such an address.
    """
    known: dict[tuple[Any, ...], str] = {}
    for worker in workers:
        try:
            addresses(worker)
        except ValueError as error:
            raise WorkerError(f"the address of a worker {error}") from None
        host, _, port = worker.rpartition(":")
        try:
            found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise WorkerError(f"{worker}: no machine of this name is found ({error.strerror or error})") from None
        for *_, place in found:
            if other := known.get(place):
                raise WorkerError(f"{other} and {worker} are one worker: give each of them once")
        known.update((place, worker) for *_, place in found)


def _register(worker: str) -> ctypes.c_void_p:
    from clex_local.library.log import ERROR, logged

    rpc = _ggml().ggml_backend_reg_by_name(b"RPC")
    if not rpc:
        raise WorkerError("this clex-local was built without RPC; install it again without CLEX_RPC=OFF in CMAKE_ARGS")
    find = load_ggml().ggml_backend_reg_get_proc_address
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(find(rpc, b"ggml_backend_rpc_add_server"))
    if ask := find(rpc, b"ggml_backend_rpc_set_waiting"):  # which a library of somebody else's lacks
        asked_while_waiting(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ask))
    with kept_until_return(), logged(ERROR) as errors:
        registered = add(worker.encode())
    if not registered:
        raise WorkerError(errors[-1].split(": ", 1)[-1] if errors else f"{worker}: this worker has no devices")
    return ctypes.c_void_p(registered)


def _local_gpus() -> list[int]:
    ggml, base = _ggml(), load_ggml()
    found = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    kinds = {
        kind: [device for device in found if base.ggml_backend_dev_type(device) == kind]
        for kind in (_GPU, _INTEGRATED_GPU)
    }
    return kinds[_GPU] or kinds[_INTEGRATED_GPU]  # as llama.cpp chooses


@functools.cache
def _ggml() -> Any:
    """The library of ggml's registry, with its backends, and with the types of what is called here."""
    library, base = ctypes.CDLL(str(library_path() / library_file("ggml"))), load_ggml()
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for where, function, result, *arguments in (
        (library, "ggml_backend_reg_by_name", pointer, text),
        (library, "ggml_backend_dev_count", size),
        (library, "ggml_backend_dev_get", pointer, size),
        (base, "ggml_backend_dev_type", ctypes.c_int, pointer),
        (base, "ggml_backend_reg_dev_count", size, pointer),
        (base, "ggml_backend_reg_dev_get", pointer, pointer, size),
        (base, "ggml_backend_reg_get_proc_address", pointer, pointer, text),
    ):
        called = getattr(where, function)
        called.restype, called.argtypes = result, arguments
    load_backends(library_path())
    return library
