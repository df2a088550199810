"""A model in several files is run as the same one in a single file, with all that its later parts hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clex_local import ClexError, Llama, open_model
from clex_local.model_file import context_plan
from clex_local.model_file.context_plan import cache_plan
from clex_local.model_file.facts import ModelFacts
from clex_local.model_file.split_files import model_bytes, model_files
from clex_local.runtime.prompt_cache import model_number
from clex_local.server.options import ServeOptions
from clex_local.server.plan import plan_service
from clex_local.server.serving import plan_models
from helpers.gguf_maker import gguf_bytes, write_split
from helpers.random_gguf import make_model, model_parts

pytestmark = pytest.mark.runtime

LENGTH, BATCH = 8192, 32


def write(path: Path, *, split: bool, **options) -> Path:
    """A model whose later part, where it has one, is larger than the first."""
    keys, tensors = model_parts(tables=False, original=LENGTH, n_layer=4, **options)
    if not split:
        path.write_bytes(gguf_bytes(keys, tensors))
        return path
    last = {name: tensors.pop(name) for name in list(tensors) if name != "token_embd.weight"}
    architecture = {"general.architecture": keys["general.architecture"]}
    return write_split(path, [(keys, tensors), (architecture, last)])[0]


@pytest.fixture
def whole(tmp_path) -> Path:
    return write(tmp_path / "whole.gguf", split=False)


@pytest.fixture
def first(tmp_path) -> Path:
    return write(tmp_path / "parts", split=True)


def test_files_of_a_model_are_found_by_the_name_of_any(first, whole, tmp_path):
    second = first.with_name("model-00002-of-00002.gguf")
    assert model_files(first) == model_files(second) == [first, second]
    assert model_bytes(first) == first.stat().st_size + second.stat().st_size > whole.stat().st_size
    assert model_files(whole) == [whole]
    # Names that only look like those of parts, and parts that are not there.
    for name in ("best-of-breed.gguf", "a-1-of-2.gguf", "a-000001-of-000002.gguf"):
        path = tmp_path / name
        path.write_bytes(b"12345")
        assert (model_files(path), model_bytes(path)) == ([path], 5)
    second.unlink()
    assert model_files(first) == [first]
    assert model_files(tmp_path / "a-00001-of-99999999999.gguf") == [tmp_path / "a-00001-of-99999999999.gguf"]


def test_context_leaves_room_for_all_parts(first, whole, monkeypatch):
    shape = ModelFacts.read(whole).shape
    assert shape
    needed = cache_plan(shape, LENGTH // 2, "f16", True, BATCH).needed
    monkeypatch.setattr(context_plan, "available_bytes", lambda: (model_bytes(whole) + needed) * 4 // 3 + 1)
    sizes = []
    for path in (whole, first):
        with open_model(path, threads=1, n_gpu_layers=0, kv_type="f16", batch=BATCH) as llm:
            sizes.append(llm.n_ctx())
    assert sizes[0] < LENGTH
    assert sizes[0] - sizes[1] in (0, 256)  # the headers of two files are larger than that of one


def test_server_plans_for_all_parts(first, whole):
    options = ServeOptions(kv_type="f16", batch=BATCH)
    for available in (4 << 20, 16 << 20, 512 << 20):
        plans = [plan_service(path, options, available=available) for path in (whole, first)]
        assert plans[0].prompt_cache - plans[1].prompt_cache in range(1 << 16)
        alone, split = (replace(plan, path="", prompt_cache=0) for plan in plans)
        assert split.parallel == alone.parallel
        assert alone.context.n_ctx - split.context.n_ctx in (0, 256)


def test_server_takes_every_model_of_a_folder(first):
    folder = first.parent
    for name in ("best-of-breed.gguf", "one-of-a-kind-00002.gguf", "a-1-of-2.gguf", "mmproj-of-it.gguf"):
        make_model(folder / name)
    (folder / "folder.gguf").mkdir()
    names = [Path(plan.path).name for plan in plan_models(folder, ServeOptions())]
    assert names == ["a-1-of-2.gguf", "best-of-breed.gguf", first.name, "one-of-a-kind-00002.gguf"]
    first.unlink()
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ClexError, match="no GGUF files in this folder"):  # a later part is no model
        plan_models(folder, ServeOptions())


def test_models_that_differ_in_a_later_part_are_told_apart(first, tmp_path):
    numbers = []
    for path in (first, write(tmp_path / "copy", split=True, seed=0), write(tmp_path / "other", split=True, seed=1)):
        if path.parent.name == "other":
            path.write_bytes(first.read_bytes())
        with Llama(path, n_ctx=64, n_threads=1, verbose=False) as llm:
            numbers.append(model_number(llm, llm._options))
    assert numbers[0] == numbers[1] != numbers[2]


def test_classifier_is_found_in_a_later_part(tmp_path):
    keys, tensors = model_parts()
    architecture = {"general.architecture": keys["general.architecture"]}
    paths = write_split(tmp_path / "parts", [(keys, tensors), (architecture, {"cls.weight": tensors["output.weight"]})])
    assert ModelFacts.read(paths[0]).has_classifier
    assert not ModelFacts.read(make_model(tmp_path / "model.gguf")).has_classifier
