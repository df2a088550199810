"""What a conversion reads of a model folder: the weights that transformers reads, and what it needs beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clex_convert import convert
from clex_convert.errors import ConvertError
from clex_convert.gguf_writer import tensors_of
from clex_local.model_file.gguf_file import GGUFFile
from clex_train.model import load_model

pytestmark = [pytest.mark.convert, pytest.mark.folders]

DATA = Path(__file__).parent / "data"
LLAMA, PHI2 = DATA / "llama", DATA / "phi2"
NAMES = sorted(load_file(LLAMA / "model.safetensors"))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
PROBE = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden LLaMA without weights."""
    return shutil.copytree(LLAMA, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))


def weights(value: float) -> dict[str, torch.Tensor]:
    """Those of the golden LLaMA, with one tensor that tells whose they are."""
    tensors = load_file(LLAMA / "model.safetensors")
    return {**tensors, PROBE: torch.full_like(tensors[PROBE], value)}


def save(path: Path, value: float, names: list[str] | None = None) -> None:
    tensors = {name: tensor for name, tensor in weights(value).items() if names is None or name in names}
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def shards(folder: Path, value: float, names: tuple[str, str] = SHARDS, index: str | None = INDEX) -> None:
    parts = dict(zip(names, (NAMES[:9], NAMES[9:]), strict=True))
    for part, held in parts.items():
        (folder / part).parent.mkdir(exist_ok=True)
        save(folder / part, value, held)
    if index is not None:
        weight_map = {name: part for part, held in parts.items() for name in held}
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def converted(folder: Path) -> float:
    """The value that tells whose weights are in the file that a folder gives."""
    out = folder.parent / "out.gguf"
    convert(folder, out, outtype="f32", check="none", overwrite=True)
    with GGUFFile(out) as file:
        tensor = next(tensor for tensor in tensors_of(file) if tensor.name == "output_norm.weight")
    values = np.fromfile(out, "<f4", count=8, offset=tensor.offset)
    assert (values == values[0]).all()
    return float(values[0])


def by_transformers(folder: Path) -> float:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    model = load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return float(model.state_dict()[PROBE][0])


BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
# Each makes a folder whose weights hold 1 where they are those of the model, and 2 where they are not.
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "one file beside a stale index": lambda f: (save(f / "model.safetensors", 1), shards(f, 2)),
    "one file beside stale shards": lambda f: (save(f / "model.safetensors", 1), shards(f, 2, index=None)),
    "a stale index whose shards are gone": lambda f: (
        shards(f, 2),
        [(f / name).unlink() for name in SHARDS],
        save(f / "model.safetensors", 1),
    ),
    "shards beside those of a longer model": lambda f: (
        shards(f, 1),
        save(f / "model-00003-of-00003.safetensors", 2),
    ),
    "other names of shards": lambda f: shards(f, 1, tuple(f"weights-{i}.safetensors" for i in "ab")),
    "shards in a folder of their own": lambda f: shards(f, 1, tuple(f"weights/{i}.safetensors" for i in "ab")),
    "shards before a bin": lambda f: (shards(f, 1), save(f / "pytorch_model.bin", 2)),
    "one file before a bin": lambda f: (save(f / "model.safetensors", 1), save(f / "pytorch_model.bin", 2)),
    "one bin beside a stale index": lambda f: (
        save(f / "pytorch_model.bin", 1),
        shards(f, 2, BIN_SHARDS, "pytorch_model.bin.index.json"),
    ),
    "other people's files": lambda f: (
        save(f / "model.safetensors", 1),
        *(save(f / f"{name}.safetensors", 2) for name in ("consolidated", "adapter_model", "model.fp16", "model-00")),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_that_transformers_reads(layout: str, folder: Path) -> None:
    LAYOUTS[layout](folder)
    assert by_transformers(folder) == 1
    assert converted(folder) == 1


def test_shards_without_an_index_are_told_by_their_names(folder: Path) -> None:
    shards(folder, 1, index=None)
    assert converted(folder) == 1
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ConvertError, match=rf"folder: holds the shards {SHARDS[0]} and no index of them"):
        converted(folder)


def variant(folder: Path) -> None:
    save(folder / "model.fp16.safetensors", 1)


def index_alone(folder: Path) -> None:
    shards(folder, 1)
    for name in SHARDS:
        (folder / name).unlink()


def unlisted(folder: Path) -> None:
    shards(folder, 1)
    save_file({"x": torch.zeros(2)} | load_file(folder / SHARDS[1]), folder / SHARDS[1])


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (index_alone, rf"folder: the index places .+ in {SHARDS[0]}, which is missing; download it again"),
    (variant, "holds no weights, .+; it holds model.fp16.safetensors, which transformers does not look for"),
    (unlisted, rf"{SHARDS[1]}: holds x, which the index does not list; the two are of different models"),
    (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), f"{INDEX}: lists no weights"),
    (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d"),
        "model.safetensors: is a pointer of git-lfs, not the file; get the file with: git lfs pull",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_weights_that_are_not_all_there_are_named(make: Callable[[Path], None], message: str, folder: Path) -> None:
    make(folder)
    with pytest.raises(ConvertError, match=message):
        converted(folder)
    assert not (folder.parent / "out.gguf").exists()


# beside the weights


def note_of(folder: Path, **options: object) -> list[str]:
    options = {"outtype": "f32", "check": "none", "overwrite": True, **options}
    return convert(folder, folder.parent / "out.gguf", **options).notes  # pyright: ignore


GENERATION = '{"temperature": 0.5, "top_k": 20}'
SPOILED: dict[str, tuple[str, bytes]] = {
    "card: no YAML": ("README.md", b"---\nlicense: [\n---\n# x"),
    "card: not UTF-8": ("README.md", b"---\nlicense: mit\xe8\n---\n# x"),
    "card: a number for a license": ("README.md", b"---\nlicense: 3\n---\n# x"),
    "card: a number for a model": ("README.md", b"---\nbase_model: [{name: 3}]\n---\n# x"),
    "generation config: no JSON": ("generation_config.json", b"{"),
    "generation config: a list": ("generation_config.json", b"[1]"),
    "generation config: text for a number": ("generation_config.json", b'{"top_k": "many"}'),
    "generation config: a fraction for a count": ("generation_config.json", b'{"top_k": 20.5}'),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_a_model_does_without_is_left_out(case: str, folder: Path) -> None:
    save(folder / "model.safetensors", 1)
    (folder / "generation_config.json").write_text(GENERATION)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# ü")
    assert note_of(folder) == []
    name, data = SPOILED[case]
    (folder / name).write_bytes(data)
    (note,) = note_of(folder)
    assert note.startswith(f"{folder / name} cannot be used and was left out (")
    with GGUFFile(folder.parent / "out.gguf") as file:
        assert file.get("general.license") == (None if name == "README.md" else "mit")
        assert file.get("general.sampling.top_k") == (20 if name == "README.md" else None)


NEEDED: list[tuple[str, bytes, str]] = [
    ("tokenizer_config.json", b"{", r"tokenizer_config.json: cannot be read \(.+\); download it again$"),
    ("tokenizer_config.json", b"[]", r"tokenizer_config.json: cannot be read \(it holds no JSON object\)"),
    (
        "special_tokens_map.json",
        b"",
        r"special_tokens_map.json: cannot be read \(.+\); download it again, or remove it",
    ),
    ("added_tokens.json", b"[", r"added_tokens.json: cannot be read \(.+\); download it again, or remove it"),
    ("chat_template.jinja", b"{{ '\xe9' }}", r"chat_template.jinja: cannot be read \(.+\); download it again, or rem"),
    ("chat_template.json", b"{{", r"chat_template.json: cannot be read \(.+\); download it again, or remove it"),
    ("tokenizer.model", b"", r"tokenizer.model: is empty; download it again"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer.model: is a pointer of git-lfs"),
]


@pytest.mark.parametrize(("name", "data", "message"), NEEDED)
def test_what_a_model_needs_is_named(name: str, data: bytes, message: str, folder: Path) -> None:
    save(folder / "model.safetensors", 1)
    (folder / name).write_bytes(data)
    with pytest.raises(ConvertError, match=message):
        converted(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_byte_order_marks_are_no_matter(name: str, folder: Path) -> None:
    save(folder / "model.safetensors", 1)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert note_of(folder) == []
    expected = (folder.parent / "out.gguf").read_bytes()
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert note_of(folder) == []
    assert (folder.parent / "out.gguf").read_bytes() == expected


def vocabulary(file: GGUFFile) -> dict[str, str]:
    return {key: str(file.get(key)) for key in file.keys() if key.startswith("tokenizer.")}  # noqa: SIM118


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"extra_special_tokens": ["<|endoftext|>"]},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|endoftext|>"], "backend": "tokenizers"},
    ],
    ids=["class", "tokens", "both"],
)
def test_a_tokenizer_saved_by_transformers_5_gives_the_same_vocabulary(changes: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(PHI2, tmp_path / "folder", ignore=shutil.ignore_patterns("*.npz"))
    note_of(folder, pre_tokenizer="gpt-2")
    with GGUFFile(tmp_path / "out.gguf") as file:
        expected = vocabulary(file)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert note_of(folder, pre_tokenizer="gpt-2") == []
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert vocabulary(file) == expected


def test_a_path_that_is_no_text_is_said_to_be_that(folder: Path) -> None:
    save(folder / "model.safetensors", 1)
    odd = folder.rename(folder.parent / os.fsdecode(b"bad\xff"))
    with pytest.raises(ConvertError, match="its path is not valid UTF-8, so safetensors cannot open it; rename it"):
        converted(odd)
    good, out = odd.rename(folder), folder.parent / os.fsdecode(b"out\xff.gguf")
    convert(good, out, outtype="f32")  # the check decodes with it
    convert(out, good.parent / "again.gguf")
    assert (good.parent / "again.gguf").is_file()
