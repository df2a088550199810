"""ggml_flash_attn_ext on the CPU backend, driven through ctypes, and the same in float64."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
QUANTIZED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # in blocks of 32 values


@dataclass(frozen=True)
class Case:
    """One call. Its numbers follow from the seed."""

    seed: int = 0
    n_q: int = 1
    n_kv: int = 64
    n_head_kv: int = 1
    group: int = 1  # query heads on one KV head
    n_stream: int = 1
    size_k: int = 64  # of a head
    size_v: int = 64
    type_k: str = "f16"
    type_v: str = "f16"
    mask: str = "none"  # none, causal, random, blocks, rows, all; see make_mask
    mask_heads: bool = False  # one for each head, and for each stream
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    sharpness: float = 1.0  # standard deviation of the logits
    cache_layout: bool = True  # the heads of a position lie beside each other, as in a KV cache
    threads: int = 1

    @property
    def n_head(self) -> int:
        return self.n_head_kv * self.group


@dataclass(frozen=True)
class Tensors:
    """What a case computes with; K and V as ggml's own bytes."""

    case: Case
    q: np.ndarray  # float32 [n_stream, n_head, n_q, size_k]
    k: np.ndarray  # uint8 [n_stream, n_head_kv, n_kv, bytes of a row]
    v: np.ndarray
    mask: np.ndarray | None  # float16 [n_stream or 1, n_head or 1, n_q, n_kv]
    sinks: np.ndarray | None  # float32 [n_head]


class Ggml:
    """The functions of one build of ggml; a process can hold only one."""

    types = TYPES

    class InitParams(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    class TypeTraits(ctypes.Structure):
        _fields_ = (
            ("type_name", ctypes.c_char_p),
            ("blck_size", ctypes.c_int64),
            ("blck_size_interleave", ctypes.c_int64),
            ("type_size", ctypes.c_size_t),
            ("is_quantized", ctypes.c_bool),
            ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        )

    def __init__(self, directory: Path) -> None:
        self.library = ctypes.CDLL(str(directory / ("libggml.dylib" if sys.platform == "darwin" else "libggml.so")))
        pointer, size, integer, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
        row = ctypes.POINTER(ctypes.c_int64)
        self.init = self.function("ggml_init", pointer, self.InitParams)
        self.free = self.function("ggml_free", None, pointer)
        self.new_tensor = self.function("ggml_new_tensor", pointer, pointer, integer, integer, row)
        self.permute = self.function("ggml_permute", pointer, pointer, pointer, *[integer] * 4)
        self.flash_attn = self.function("ggml_flash_attn_ext", pointer, *[pointer] * 5, *[number] * 3)
        self.add_sinks = self.function("ggml_flash_attn_ext_add_sinks", None, pointer, pointer)
        self.new_graph = self.function("ggml_new_graph", pointer, pointer)
        self.expand = self.function("ggml_build_forward_expand", None, pointer, pointer)
        self.row_size = self.function("ggml_row_size", size, integer, ctypes.c_int64)
        self.quantize_chunk = self.function(
            "ggml_quantize_chunk", size, integer, pointer, pointer, *[ctypes.c_int64] * 3, pointer
        )
        self.type_traits = self.function("ggml_get_type_traits", ctypes.POINTER(self.TypeTraits), integer)
        self.allocate = self.function("ggml_backend_alloc_ctx_tensors", pointer, pointer, pointer)
        self.release = self.function("ggml_backend_buffer_free", None, pointer)
        self.set = self.function("ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.get = self.function("ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.compute = self.function("ggml_backend_graph_compute", integer, pointer, pointer)
        self.backend, self.set_threads = self._cpu()

    def _cpu(self) -> tuple[Any, Any]:
        """The CPU's backend, which may be a library of its own, and the function that sets its threads."""
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.function("ggml_backend_load_all", None)()
        device = self.function("ggml_backend_dev_by_type", pointer, integer)(0)
        backend = self.function("ggml_backend_dev_init", pointer, pointer, pointer)(device, None)
        registry = self.function("ggml_backend_dev_backend_reg", pointer, pointer)(device)
        find = self.function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        address = find(registry, b"ggml_backend_set_n_threads")
        return backend, ctypes.CFUNCTYPE(None, pointer, integer)(address)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(self.library, name)
        found.restype, found.argtypes = result, arguments
        return found

    def quantize(self, values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
        """Rows of float32 as uint8 [..., bytes of a row]; some types ask for the importance of the columns, float32."""
        *shape, columns = values.shape
        data = np.empty((*shape, self.row_size(self.types[kind], columns)), np.uint8)
        rows, weights = values.size // columns, None if importance is None else importance.ctypes.data
        self.quantize_chunk(self.types[kind], values.ctypes.data, data.ctypes.data, 0, rows, columns, weights)
        return data

    def dequantize(self, data: np.ndarray, kind: str, columns: int) -> np.ndarray:
        """The inverse, float32 [..., columns]."""
        if kind == "f32":
            return data.view(np.float32)
        values = np.empty((*data.shape[:-1], columns), np.float32)
        self.type_traits(self.types[kind])[0].to_float(data.ctypes.data, values.ctypes.data, values.size)
        return values

    def attend(self, tensors: Tensors) -> np.ndarray:
        """Compute one graph: float32 [n_stream, n_q, n_head, size_v]."""
        case = tensors.case
        context = self.init(self.InitParams(1 << 20, None, True))
        values: list[tuple[int, np.ndarray]] = []

        def tensor(kind: str, sizes: tuple[int, ...], data: np.ndarray, heads_first: bool = False) -> int:
            # numpy's shapes are ggml's backwards
            if heads_first:
                sizes, data = (sizes[0], sizes[2], sizes[1], sizes[3]), data.swapaxes(1, 2)
            new = self.new_tensor(context, TYPES[kind], len(sizes), (ctypes.c_int64 * len(sizes))(*sizes))
            values.append((new, np.ascontiguousarray(data)))
            return self.permute(context, new, 0, 2, 1, 3) if heads_first else new

        q = tensor("f32", (case.size_k, case.n_q, case.n_head, case.n_stream), tensors.q, case.cache_layout)
        k, v = (
            tensor(kind, (size, case.n_kv, case.n_head_kv, case.n_stream), data, case.cache_layout)
            for kind, size, data in (
                (case.type_k, case.size_k, tensors.k),
                (case.type_v, case.size_v, tensors.v),
            )
        )
        mask = None if tensors.mask is None else tensor("f16", tensors.mask.shape[::-1], tensors.mask)
        out = self.flash_attn(context, q, k, v, mask, case.size_k**-0.5, case.max_bias, case.softcap)
        if tensors.sinks is not None:
            self.add_sinks(out, tensor("f32", (case.n_head,), tensors.sinks))
        graph = self.new_graph(context)
        self.expand(graph, out)
        buffer = self.allocate(context, self.backend)
        try:
            for pointer, data in values:
                self.set(pointer, data.ctypes.data, 0, data.nbytes)
            result = np.full((case.n_stream, case.n_q, case.n_head, case.size_v), np.nan, np.float32)
            self.set(out, result.ctypes.data, 0, result.nbytes)
            self.set_threads(self.backend, case.threads)
            assert self.compute(self.backend, graph) == 0
            self.get(out, result.ctypes.data, 0, result.nbytes)
        finally:
            self.release(buffer)
            self.free(context)
        return result

    def make(self, case: Case) -> Tensors:
        """The numbers of a case."""
        rng = np.random.default_rng(case.seed)
        keys = (case.n_stream, case.n_head_kv, case.n_kv)
        q = rng.standard_normal((case.n_stream, case.n_head, case.n_q, case.size_k), np.float32)
        k = rng.standard_normal((*keys, case.size_k), np.float32)
        # Values of one sign add up, where errors of both signs would cancel.
        v = rng.standard_normal((*keys, case.size_v), np.float32) + 0.5 * rng.standard_normal(case.size_v, np.float32)
        return Tensors(
            case,
            q * np.float32(case.sharpness),
            self.quantize(k, case.type_k),
            self.quantize(v, case.type_v),
            make_mask(case, rng),
            rng.standard_normal(case.n_head, np.float32) if case.sinks else None,
        )

    def reference(self, tensors: Tensors) -> np.ndarray:
        """What attend computes, in float64 (llama.cpp: ggml_compute_forward_soft_max_f32 has the same slopes)."""
        case = tensors.case
        k = self.dequantize(tensors.k, case.type_k, case.size_k).astype(np.float64)
        v = self.dequantize(tensors.v, case.type_v, case.size_v).astype(np.float64)
        grouped = tensors.q.astype(np.float64).reshape(
            case.n_stream, case.n_head_kv, case.group * case.n_q, case.size_k
        )
        logits = grouped @ k.swapaxes(2, 3) * np.float64(np.float32(case.size_k**-0.5))
        if case.softcap:
            logits = case.softcap * np.tanh(logits / case.softcap)
        logits = logits.reshape(case.n_stream, case.n_head, case.n_q, case.n_kv)
        if tensors.mask is not None:
            logits = logits + slopes(case)[:, None, None] * tensors.mask.astype(np.float64)
        peak = logits.max(axis=3, keepdims=True)
        if tensors.sinks is not None:
            peak = np.maximum(peak, tensors.sinks[:, None, None])
        peak = np.where(np.isfinite(peak), peak, 0.0)  # nothing to attend to
        weights = np.exp(logits - peak)
        total = weights.sum(axis=3, keepdims=True)
        if tensors.sinks is not None:
            total = total + np.exp(tensors.sinks[:, None, None] - peak)
        weights /= np.where(total == 0.0, 1.0, total)
        out = weights.reshape(case.n_stream, case.n_head_kv, case.group * case.n_q, case.n_kv) @ v
        return out.reshape(case.n_stream, case.n_head, case.n_q, case.size_v).swapaxes(1, 2)


def slopes(case: Case) -> np.ndarray:
    """ALiBi's factor of the mask for each head (https://arxiv.org/abs/2108.12409, with llama.cpp's max_bias)."""
    if not case.max_bias:
        return np.ones(case.n_head)
    power = 1 << int(np.log2(case.n_head))
    return np.array(
        [
            2.0 ** (-case.max_bias * (h + 1) / power)
            if h < power
            else 2.0 ** (-case.max_bias / 2 * (2 * (h - power) + 1) / power)
            for h in range(case.n_head)
        ]
    )


def make_mask(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    """What each query may see: all before it, any positions, any blocks of 64; any queries nothing; all nothing."""
    if case.mask == "none":
        return None
    shape = (case.n_stream, case.n_head) if case.mask_heads else (1, 1)
    shape = (*shape, case.n_q, case.n_kv)
    if case.mask == "causal":
        seen = np.broadcast_to(np.tri(case.n_q, case.n_kv, case.n_kv - case.n_q, bool), shape)
    elif case.mask == "random":
        seen = rng.random(shape) < 0.5
    elif case.mask == "blocks":
        seen = np.repeat(rng.random((*shape[:3], -(-case.n_kv // 64))) < 0.4, 64, axis=3)[..., : case.n_kv]
        # Whole tiles of queries see nothing of some blocks.
        common = np.repeat(rng.random((*shape[:2], 1, -(-case.n_kv // 64))) < 0.6, 64, axis=3)[..., : case.n_kv]
        seen = seen & common
    else:
        seen = np.broadcast_to(rng.random((*shape[:3], 1)) < (0.5 if case.mask == "rows" else 0.0), shape)
    distance = np.abs(np.arange(case.n_kv)[None] - (case.n_kv - case.n_q) - np.arange(case.n_q)[:, None])
    finite = -distance if case.max_bias else -0.01 * rng.integers(0, 100, shape)
    return np.where(seen, finite, -np.inf).astype(np.float16)


def serve(connection: Any, directory: Path) -> None:
    """Compute what comes through the pipe until None comes."""
    ggml = Ggml(directory)
    while tensors := connection.recv():
        connection.send(ggml.attend(tensors))


class Library:
    """A build of ggml in a process of its own, which `serve` is the loop of."""

    serve = staticmethod(serve)

    def __init__(self, directory: Path, **environment: str) -> None:
        self.directory, self.environment = directory, environment

    @cached_property
    def connection(self) -> Any:
        spawn = get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=self.serve, args=(theirs, self.directory), daemon=True)
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        return ours

    def attend(self, tensors: Tensors) -> np.ndarray:
        self.connection.send(tensors)
        return self.connection.recv()

    def close(self) -> None:
        if "connection" in self.__dict__:
            self.connection.send(None)
