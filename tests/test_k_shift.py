"""Shifted positions of models without tables: keys of every type are rotated to where their positions say."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from helpers.device_error import slack
from helpers.gguf_maker import gguf_bytes
from helpers.low_level import BF16, F16, F32, Q4_0, Q8_0, Context, Model
from helpers.random_gguf import model_parts, random_tokens

pytestmark = pytest.mark.native

IDS = random_tokens(80)
# RMS error of the logits over their standard deviation, about 1.4 times what was measured; 0.016 and more where the
# shift is one less.
BOUNDS = {F16: 3e-4, BF16: 3e-3, Q8_0: 0.008, Q4_0: 0.1}


@pytest.fixture(scope="module", params=[(96, 96), (64, 64), (96, 32), (128, 64), (64, 16), (32, 8)])
def model(request, tmp_path_factory):
    """Heads of a size, rotated in the first numbers only where the second is less."""
    head, n_rot = request.param
    keys, tensors = model_parts(head=head, tables=False, original=512)
    # an architecture whose heads may be rotated in part
    keys = {name.replace("llama.", "command-r."): value for name, value in keys.items()}
    keys |= {
        "general.architecture": "command-r",
        "command-r.rope.dimension_count": np.uint32(n_rot),
        "command-r.attention.layer_norm_epsilon": np.float32(1e-5),
        "command-r.logit_scale": np.float32(1),
    }
    del tensors["output.weight"]
    tensors = {name: tensor for name, tensor in tensors.items() if "ffn_norm" not in name}
    path = tmp_path_factory.mktemp("shift") / "model.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    loaded = Model(path)
    yield loaded
    loaded.close()


def shifted(model, type_k, by=-10, **options):
    """Logits of 20 tokens after 36 others, of which 32 were moved."""
    with Context(model, n_ctx=256, type_k=type_k, **options) as context:
        context.feed(IDS[:50], 0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 4, 14)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 14, -1, by)
        start = 50 + by
        return np.stack([context.feed(IDS[i : i + 1], start + i - 50) for i in range(50, 70)])


@pytest.mark.parametrize("flash_attn", [0, 1], ids=["plain", "flash"])
@pytest.mark.parametrize("type_k", BOUNDS)
def test_shift_of_every_type_of_key_is_close_to_f32(model, type_k, flash_attn):
    exact = shifted(model, F32)
    logits = shifted(model, type_k, flash_attn=flash_attn)
    assert np.isfinite(logits).all()
    error = np.sqrt(np.square(logits - exact).mean()) / exact.std()
    assert error < BOUNDS[type_k] + slack(model.path) / exact.std()
