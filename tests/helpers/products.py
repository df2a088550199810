"""ggml_mul_mat and ggml_mul_mat_id on the CPU backend, driven through ctypes, and the same in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from helpers import flash_attention

F32, I32 = 0, 26
# By their numbers in ggml.h.
TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "q5_K": 13,
    "q6_K": 14,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "bf16": 30,
    "tq1_0": 34,
    "tq2_0": 35,
    "mxfp4": 39,
    "nvfp4": 40,
    "q1_0": 41,
    "q2_0": 42,
}
FLOATS = ("f32", "f16", "bf16")
# On some processor.
REPACKED = ("q4_0", "q4_1", "q4_K", "q2_K", "iq4_nl", "iq4_xs", "mxfp4", "q8_0", "q5_K", "q6_K", "f16")


@dataclass(frozen=True)
class Case:
    """One product. Its numbers follow from the seed."""

    kind: str = "q8_0"  # of the weights
    rows: int = 64
    columns: int = 256
    tokens: int = 9
    matrices: int = 1  # of weights
    batches: int = 1  # of activations for each matrix
    used: int = 0  # experts for each token, of as many as there are matrices; 0: a plain product
    shared: bool = True  # all experts of a token have the same activations
    layout: str = "plain"  # of the activations; padded: rows have a gap, permuted: tokens and batches change places
    repacked: bool = False  # weights in the order that the processor's own buffer type has, if it has one for them
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Tensors:
    """What a case computes with; the weights as ggml's own bytes."""

    case: Case
    weights: np.ndarray  # uint8 [matrices, rows, bytes of a row]
    x: np.ndarray  # float32 [batches*matrices, tokens, columns], with experts [tokens, used or 1, columns]
    experts: np.ndarray | None  # int32 [tokens, used]


class Ggml(flash_attention.Ggml):
    """The functions that products need."""

    types = TYPES

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self.mul_mat = self.function("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.mul_mat_id = self.function("ggml_mul_mat_id", pointer, *[pointer] * 4)
        self.view_3d = self.function("ggml_view_3d", pointer, pointer, pointer, *[ctypes.c_int64] * 3, *[size] * 3)
        self.blocks = self.function("ggml_blck_size", ctypes.c_int64, integer)
        self.device = self.function("ggml_backend_get_device", pointer, pointer)
        self.registry = self.function("ggml_backend_dev_backend_reg", pointer, pointer)
        self.procedure = self.function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        self.allocate_from = self.function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.buffer_name = self.function("ggml_backend_buft_name", ctypes.c_char_p, pointer)
        self.supports = self.function("ggml_backend_supports_op", ctypes.c_bool, pointer, pointer)

    @cached_property
    def repack_buffers(self) -> list[int]:
        """The buffer types that keep weights in another order, as ggml tries them."""
        address = self.procedure(self.registry(self.device(self.backend)), b"ggml_backend_dev_get_extra_bufts")
        get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        types = get(self.device(self.backend))
        found = []
        while types and types[len(found)]:
            found.append(types[len(found)])
        return [kind for kind in found if self.buffer_name(kind) in (b"AMX", b"CPU_REPACK")]

    def make(self, case: Case) -> Tensors:
        """The numbers of a case."""
        rng = np.random.default_rng(case.seed)
        weights = rng.standard_normal((case.matrices, case.rows, case.columns), np.float32)
        shape = (
            (case.tokens, 1 if case.shared else case.used) if case.used else (case.matrices * case.batches, case.tokens)
        )
        x = rng.standard_normal((*shape, case.columns), np.float32)
        x *= np.exp(rng.standard_normal((*shape, 1), np.float32))  # tokens of different sizes
        experts = None
        if case.used:
            experts = np.argsort(rng.random((case.tokens, case.matrices)), axis=1)[:, : case.used].astype(np.int32)
        return Tensors(case, self.quantize(weights, case.kind, np.ones(case.columns, np.float32)), x, experts)

    def reference(self, tensors: Tensors, weights: np.ndarray | None = None, x: np.ndarray | None = None) -> np.ndarray:
        """What multiply computes, in float64, or the same with other numbers."""
        case = tensors.case
        if weights is None:
            weights = self.dequantize(tensors.weights, case.kind, case.columns)
        x = (tensors.x if x is None else x).astype(np.float64)
        weights = weights.astype(np.float64)
        if tensors.experts is None:
            return x @ np.repeat(weights, case.batches, axis=0).swapaxes(1, 2)
        x = np.broadcast_to(x, (case.tokens, case.used, x.shape[2]))
        return np.stack(
            [[weights[e] @ v for e, v in zip(*row, strict=True)] for row in zip(tensors.experts, x, strict=True)]
        )

    def multiply(self, tensors: Tensors, attempt: int = 0) -> np.ndarray:
        """Compute one graph: float32 [batches*matrices, tokens, rows], with experts [tokens, used, rows].

        Weights that are repacked lie in the first buffer type from `attempt` on that takes them, or are not.
        """
        case = tensors.case
        # weights that are repacked lie in a buffer of their own
        contexts = [self.init(self.InitParams(1 << 20, None, True)) for _ in range(2)]
        values: list[tuple[int, np.ndarray]] = []

        def tensor(kind: int, sizes: tuple[int, ...], data: np.ndarray, context: int) -> int:
            new = self.new_tensor(context, kind, len(sizes), (ctypes.c_int64 * len(sizes))(*sizes))
            values.append((new, np.ascontiguousarray(data)))
            return new

        sizes = (case.columns, case.rows, *((case.matrices,) if case.matrices > 1 or case.used else ()))
        weights = tensor(TYPES[case.kind], sizes, tensors.weights, contexts[0])
        x = self.activations(contexts[1], tensor, case, tensors.x)
        if tensors.experts is None:
            out = self.mul_mat(contexts[1], weights, x)
        else:
            ids = tensor(I32, tensors.experts.shape[::-1], tensors.experts, contexts[1])
            out = self.mul_mat_id(contexts[1], weights, x, ids)
        buffers = []
        try:
            if case.repacked and len(self.repack_buffers) > attempt:
                buffers.append(self.allocate_from(contexts[0], self.repack_buffers[attempt]))
                if not self.supports(self.backend, out):
                    return self.multiply(tensors, attempt + 1)
            else:
                buffers.append(self.allocate(contexts[0], self.backend))
            return self.compute_graph(contexts[1], out, values, buffers, tensors)
        finally:
            for buffer in buffers:
                self.release(buffer)
            for context in contexts:
                self.free(context)

    def activations(self, context: int, tensor: Any, case: Case, x: np.ndarray) -> int:
        """The tensor of them in the layout of the case."""
        first, second, columns = x.shape
        if case.layout == "padded":
            wide = np.full((first, second, columns + 32), np.nan, np.float32)
            wide[:, :, :columns] = x
            new = tensor(F32, wide.shape[::-1], wide, context)
            row = 4 * (columns + 32)
            return self.view_3d(context, new, columns, second, first, row, row * second, 0)
        if case.layout == "permuted":
            new = tensor(F32, (columns, first, second), x.swapaxes(0, 1), context)
            return self.permute(context, new, 0, 2, 1, 3)
        return tensor(F32, (columns, second, first), x, context)

    def compute_graph(
        self, context: int, out: int, values: list[tuple[int, np.ndarray]], buffers: list[int], tensors: Tensors
    ) -> np.ndarray:
        graph = self.new_graph(context)
        self.expand(graph, out)
        buffers.append(self.allocate(context, self.backend))
        for pointer, data in values:
            self.set(pointer, data.ctypes.data, 0, data.nbytes)
        first, second, _ = tensors.x.shape
        result = np.full((first, tensors.case.used or second, tensors.case.rows), np.nan, np.float32)
        self.set(out, result.ctypes.data, 0, result.nbytes)
        self.set_threads(self.backend, tensors.case.threads)
        assert self.compute(self.backend, graph) == 0
        self.get(out, result.ctypes.data, 0, result.nbytes)
        return result


def serve(connection: Any, directory: Path) -> None:
    """Compute what comes through the pipe until None comes."""
    ggml = Ggml(directory)
    while tensors := connection.recv():
        connection.send(ggml.multiply(tensors))


class Library(flash_attention.Library):
    """A build of ggml in a process of its own."""

    serve = staticmethod(serve)

    def multiply(self, tensors: Tensors) -> np.ndarray:
        self.connection.send(tensors)
        return self.connection.recv()
