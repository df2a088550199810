"""Folders saved by transformers before and since release 5, loaded by the one that is installed.

What the other release writes is written out here; make test runs the tests of folders with both.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from clex_convert.transformers_folder import load_config, load_tokenizer, rope_scaling, rope_theta
from clex_eval.folder import FolderModel, folder_coverage
from clex_train.model import load_model
from helpers.tiny_models import make_model

pytestmark = [pytest.mark.convert, pytest.mark.train, pytest.mark.folders]

DATA = Path(__file__).parent / "data"
LLAMA, PHI2 = DATA / "llama", DATA / "phi2"


@pytest.mark.parametrize(
    ("package", "versions"),
    {
        "transformers": ("4.57.0", "4.57.6", "5.0.0", "5.24.0"),
        "huggingface-hub": ("0.34.0", "0.36.2", "1.31.0", "2.4.0"),  # below 1 for transformers 4, above for 5
        "datasets": ("4.8.5", "5.2.0"),  # below 2 of the hub's client, and above
    }.items(),
)
def test_both_generations_may_be_installed(package: str, versions: tuple[str, ...]) -> None:
    requirements = [Requirement(text) for text in importlib.metadata.requires("clex-local") or ()]
    (found,) = [one for one in requirements if one.name.replace("_", "-") == package]
    assert all(version in found.specifier for version in versions)


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop} | changes
    path.write_text(json.dumps(values))
    return values


def as_5_saves_it(folder: Path, **rope: Any) -> None:
    """The config of a folder with the whole of its RoPE in rope_parameters, and nothing of it elsewhere."""
    config = json.loads((folder / "config.json").read_text())
    said = config.get("rope_parameters") or {"rope_type": "default", **(config.get("rope_scaling") or {})}
    said |= {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config} | rope
    gone = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_parameters")
    edit(folder / "config.json", drop=gone, rope_parameters=said)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("Llama", {}, tmp_path / "base", LLAMA)
    return tmp_path / "base"


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_base_of_a_newer_config_is_not_lost(base: Path) -> None:
    edit(base / "config.json", drop=("rope_parameters", "rope_scaling"), rope_theta=500.0)
    before = logits(load_model(base))
    plain = load_model(base, scaling={"rope_type": "linear", "factor": 3.0})
    as_5_saves_it(base)
    assert rope_theta(load_config(base)) == 500.0
    assert torch.equal(logits(load_model(base)), before)
    scaled = load_model(base, scaling={"rope_type": "linear", "factor": 3.0})
    assert torch.equal(logits(scaled), logits(plain))
    assert not torch.allclose(logits(scaled), before, atol=1e-3)
    with FolderModel(base, folder_coverage(base), 64, clamp=False, threads=None) as model:
        assert torch.equal(logits(model._model), before)


def test_the_scaling_of_a_newer_config_is_not_lost(base: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    as_5_saves_it(base, rope_theta=500.0, **scaling)
    edit(base / "config.json", max_position_embeddings=256)
    config = load_config(base)
    assert rope_scaling(config).items() >= scaling.items()
    assert rope_theta(config) == 500.0
    assert load_model(base).model.rotary_emb.config.rope_scaling["rope_type"] == "yarn"


def test_a_layer_in_a_newer_config_is_found(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "clex")
    as_5_saves_it(tmp_path / "clex")
    assert torch.equal(logits(load_model(tmp_path / "clex")), logits(load_model(LLAMA)))


@pytest.mark.parametrize("changes", [{"extra_special_tokens": ["<s>", "</s>"]}, {}], ids=["list", "none"])
@pytest.mark.parametrize("kind", ["TokenizersBackend", "GPT2Tokenizer", None])
def test_tokenizers_saved_by_release_5(changes: dict[str, Any], kind: str | None, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PHI2 / name, tmp_path)
    (tmp_path / "config.json").write_text((PHI2 / "config.json").read_text())
    text = "The quick brown fox, naïve €5 and 1234 apples<|endoftext|>x"
    expected = load_tokenizer(tmp_path)(text)["input_ids"]
    drop = ("tokenizer_class", "additional_special_tokens", "added_tokens_decoder")
    changes = {"backend": "tokenizers", "is_local": True, **changes, **({"tokenizer_class": kind} if kind else {})}
    edit(tmp_path / "tokenizer_config.json", drop=drop, **changes)
    tokenizer = load_tokenizer(tmp_path)
    if "extra_special_tokens" not in changes:
        assert tokenizer(text)["input_ids"] == expected
    else:
        assert {"<s>", "</s>"} <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_tokenizer_without_a_vocabulary_is_none(content: bytes | None, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(Exception, match=r".+"):
        load_tokenizer(tmp_path)
