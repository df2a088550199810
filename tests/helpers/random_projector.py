"""A tiny random vision projector (mmproj) for the models of `random_gguf`, and images for it."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import numpy as np

from helpers.gguf_maker import gguf_bytes

SIDE, PATCH = 28, 14  # pixels; a patch becomes one embedding


def make_projector(path: Path, *, width: int = 64) -> Path:
    """Write a projector of the kind of LLaVA for embeddings of this width, and return its path."""
    rng = np.random.default_rng(11)
    inner, ffn, patches = 32, 32, (SIDE // PATCH) ** 2

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    tensors = {
        "v.patch_embd.weight": matrix(inner, 3, PATCH, PATCH),
        "v.position_embd.weight": matrix(patches, inner),
        "mm.0.weight": matrix(width, inner),
        "mm.0.bias": np.zeros(width, np.float32),
        "mm.2.weight": matrix(width, width),
        "mm.2.bias": np.zeros(width, np.float32),
    }
    for i in range(2):  # the last one is left out
        for name in ("q", "k", "v", "out"):
            tensors[f"v.blk.{i}.attn_{name}.weight"] = matrix(inner, inner)
            tensors[f"v.blk.{i}.attn_{name}.bias"] = np.zeros(inner, np.float32)
        for name, shape in (("up", (ffn, inner)), ("down", (inner, ffn))):
            tensors[f"v.blk.{i}.ffn_{name}.weight"] = matrix(*shape)
            tensors[f"v.blk.{i}.ffn_{name}.bias"] = np.zeros(shape[0], np.float32)
        for name in ("ln1", "ln2"):
            tensors[f"v.blk.{i}.{name}.weight"] = np.ones(inner, np.float32)
            tensors[f"v.blk.{i}.{name}.bias"] = np.zeros(inner, np.float32)
    keys = {
        "general.architecture": "clip",
        "general.file_type": np.uint32(0),
        "clip.has_vision_encoder": np.bool_(True),
        "clip.projector_type": "mlp",
        "clip.use_gelu": np.bool_(True),
        "clip.vision.image_size": np.uint32(SIDE),
        "clip.vision.patch_size": np.uint32(PATCH),
        "clip.vision.embedding_length": np.uint32(inner),
        "clip.vision.feed_forward_length": np.uint32(ffn),
        "clip.vision.projection_dim": np.uint32(width),
        "clip.vision.block_count": np.uint32(2),
        "clip.vision.attention.head_count": np.uint32(2),
        "clip.vision.attention.layer_norm_epsilon": np.float32(1e-5),
        "clip.vision.image_mean": np.full(3, 0.5, np.float32),
        "clip.vision.image_std": np.full(3, 0.5, np.float32),
    }
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def image_url(red: int = 200) -> str:
    """An image of one color, as a PNG in a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes((red, 40, 90)) * SIDE) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
