"""What clex-serve plans before it loads a model: checkpoints of windows and states, which the server keeps to."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from clex_local import ClexError, serve
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.memory import checkpoint_bytes
from clex_local.model_file.model_shape import ModelShape
from clex_local.server.options import ServeOptions
from clex_local.server.plan import CHECKPOINTS, LEAST_CHECKPOINTS, plan_service, server_settings
from helpers.random_architectures import make_architecture
from helpers.random_gguf import make_model, random_tokens
from test_cache_kinds import write_model

pytestmark = pytest.mark.serve

MIB = 2**20
WINDOW = np.uint32(256)
SIZES = {"head": 64, "n_head": 4, "n_head_kv": 4}
OPTIONS = ServeOptions(ctx=1024, parallel=2, batch=64)


def make(path: Path, name: str, window: np.uint32 = WINDOW) -> Path:
    if name == "gemma3":
        return write_model(path, name, window, n_layer=4, original=1024, **SIZES)
    if name == "llama":
        return make_model(path, n_layer=4, original=1024, **SIZES)
    more = {} if name == "lfm2" else {f"{name}.attention.sliding_window": window}
    return make_architecture(path, name, more=more, original=1024, **SIZES)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "lfm2"])
def test_checkpoints_are_those_of_the_server(tmp_path, capsys, name, kv_type):
    path = make(tmp_path / "model.gguf", name)
    options = replace(OPTIONS, kv_type=kv_type, port=0, threads=1, verbose=True)
    args = {**vars(options), "server_args": ("--no-warmup", "--verbosity", "4")}
    with serve(path, **args) as server:
        asked = {"prompt": random_tokens(600), "n_predict": 1}
        assert httpx.post(f"{server.url}/completion", json=asked, timeout=60).status_code == 200
    found = re.findall(r"created context checkpoint \d+ of (\d+) .*size = ([\d.]+) MiB", capsys.readouterr().err)
    plan = plan_service(path, options)
    assert {int(most) for most, _ in found} == {plan.checkpoints} == {CHECKPOINTS}
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    assert shape is not None
    size = checkpoint_bytes(shape, 1024, kv_type)
    assert max(float(size) for _, size in found) == pytest.approx(size / MIB, rel=0.03, abs=0.001)
    assert plan.context.checkpoints == 2 * CHECKPOINTS * size


def test_model_that_goes_back_without_them_has_none(tmp_path):
    path = make(tmp_path / "model.gguf", "llama")
    plan = plan_service(path, OPTIONS)
    assert (plan.checkpoints, plan.context.checkpoints) == (None, 0)
    assert "ctx-checkpoints" not in server_settings(plan, OPTIONS, tmp_path)
    assert "to go back" not in " ".join(plan.lines())


@pytest.mark.parametrize(("name", "storable"), [("llama", True), ("gemma2", True), ("lfm2", False)])
def test_folder_is_named_where_something_is_kept_in_it(tmp_path, name, storable):
    assert plan_service(make(tmp_path / "model.gguf", name), OPTIONS).storable is storable


def test_checkpoints_are_as_many_as_fit(tmp_path):
    path = make(tmp_path / "model.gguf", "gemma2", np.uint32(1024))
    many = plan_service(path, OPTIONS, available=4096 * MIB)
    assert many.checkpoints == CHECKPOINTS
    assert f"{2 * CHECKPOINTS * 2} MiB to go back in it" in many.lines()[1]
    some = plan_service(path, OPTIONS, available=128 * MIB)
    assert some.checkpoints in range(LEAST_CHECKPOINTS + 1, CHECKPOINTS)
    few = plan_service(path, OPTIONS, available=48 * MIB)
    assert few.checkpoints == LEAST_CHECKPOINTS
    for plan, available in [(many, 4096 * MIB), (some, 128 * MIB), (few, 48 * MIB)]:
        assert server_settings(plan, OPTIONS, tmp_path)["ctx-checkpoints"] == str(plan.checkpoints)
        assert path.stat().st_size + plan.context.needed + plan.prompt_cache <= available


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_weights_are_read_into_memory_that_holds_them_twice(tmp_path):
    path = make(tmp_path / "model.gguf", "llama", np.uint32(1024))
    with path.open("ab") as file:
        file.truncate(64 * MIB)
    enough, short = (plan_service(path, OPTIONS, available=size * MIB) for size in (128, 127))
    assert "load-mode" in server_settings(enough, OPTIONS, tmp_path)
    assert "load-mode" not in server_settings(short, OPTIONS, tmp_path)
    for mmap in (True, False):
        plan = plan_service(path, replace(OPTIONS, mmap=mmap))
        assert ("load-mode" in server_settings(plan, OPTIONS, tmp_path)) is not mmap


def test_memory_without_room_for_the_least_is_refused_before_anything_is_loaded(tmp_path):
    path = make(tmp_path / "model.gguf", "gemma2", np.uint32(1024))
    options = replace(OPTIONS, kv_type="f16")
    plan = plan_service(path, options, available=4096 * MIB)
    least = plan.context.kv + plan.context.compute + plan.context.checkpoints * LEAST_CHECKPOINTS // CHECKPOINTS
    assert plan_service(path, options, available=least).checkpoints == LEAST_CHECKPOINTS
    with pytest.raises(ClexError, match=r"needs .* of memory .* are available"):
        plan_service(path, options, available=least - MIB)
    # They shorten what is taken without being asked for, too.
    options = replace(options, ctx=None)
    shorter = plan_service(path, options, available=least)
    longer = plan_service(path, replace(options, server_args=("--ctx-checkpoints", "0")), available=least)
    assert shorter.context.n_ctx < longer.context.n_ctx


@pytest.mark.parametrize(
    ("server_args", "count"),
    [
        (("--ctx-checkpoints", "7"), 7),
        (("-ctxcp", "3", "--swa-checkpoints", "0"), 0),
        (("--embeddings",), 0),
        (("--ctx-checkpoints", "many"), CHECKPOINTS),  # llama-server says what is wrong
        (("--ctx-checkpoints",), CHECKPOINTS),
    ],
)
def test_checkpoints_that_were_asked_for_count(tmp_path, server_args, count):
    path = make(tmp_path / "model.gguf", "gemma2")
    one = plan_service(path, OPTIONS).context.checkpoints // CHECKPOINTS
    assert plan_service(path, replace(OPTIONS, server_args=server_args)).context.checkpoints == count * one
