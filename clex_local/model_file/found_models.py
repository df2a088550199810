"""The models that are on this machine already: Ollama's, LM Studio's, the hub's cache, the current folder's."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clex_local.errors import ClexError, escaped
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.split_files import is_later_part, model_bytes
from clex_local.model_file.tables import tables_of
from clex_local.sizes import readable_size

MOST = 1000  # models, and ten times as many files and folders, that are looked at in one place
_BLOB = re.compile(r"sha256[:-][0-9a-f]{64}")
# A small model that is good for its size, for those who have none: 1.1 GB.
_REPOSITORY, _FILE = "Qwen/Qwen2.5-1.5B-Instruct-GGUF", "qwen2.5-1.5b-instruct-q4_k_m.gguf"
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_OLLAMA_DEFAULTS = ("registry.ollama.ai", "library")  # host and namespace that Ollama leaves out of names


@dataclass(frozen=True)
class FoundModel:
    """A model file that was found.

    Attributes:
        name: what it is called where it is from.
        path: the file; of a split model the first part.
        place: where it is from, in words.
    """

    name: str
    path: Path
    place: str

    def has_name(self, name: str) -> bool:
        """Whether a person may mean it by a name: its own, without ``:latest`` or ``.gguf``, or its last part."""
        own = self.name.lower().removesuffix(":latest").removesuffix(".gguf")
        wanted = name.lower().removesuffix(":latest").removesuffix(".gguf")
        return wanted in (own, own.rpartition("/")[2], own.rpartition("/")[0])


@dataclass(frozen=True)
class ModelLine:
    """What is said of a found model.

    Attributes:
        size: bytes of all its parts.
        context: tokens that it covers, 0 where it does not say.
        tables: the method of its tables, None without.
        fault: why it cannot be used.
    """

    size: int
    context: int = 0
    tables: str | None = None
    fault: str | None = None


def found_models(folder: Path | None = None) -> list[FoundModel]:
    """Every model that is found, in the order of the places, each file once.

    Args:
        folder: in place of the current one.
    """
    found: dict[str, FoundModel] = {}
    for model in _all(folder):
        found.setdefault(os.path.realpath(model.path), model)
    return list(found.values())


def _all(folder: Path | None) -> list[FoundModel]:
    return [*_in_folder(folder or Path()), *_ollama(), *_lm_studio(), *_hub()]


def model_path(given: Path) -> Path:
    """The file that a person means by a path, or by the name of a model that is found.

    Raises:
        ClexError: it is the name of none, or of several, or a folder.
    """
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        raise ClexError(f"{given}: a folder; {_model_in(path)}")
    # What can only be a path is opened as one, whatever comes of it.
    return path if os.path.exists(path) or path.is_absolute() or str(given)[:1] in ".~" else model_named(str(given))


def _model_in(folder: Path) -> str:
    """What there is to do with a folder that was named in place of a model."""
    found = next(_in_folder(folder), None)
    if found:
        return f"name a model in it, such as {escaped(found.name, 60)}"
    if os.path.isfile(folder / "config.json"):
        return "`clex-convert FOLDER OUT.gguf` makes a model of its weights"
    return "there is no GGUF file in it"


def model_named(name: str, folder: Path | None = None) -> Path:
    """The file of a model that is named, and is no file by that name.

    Args:
        name: such as ``llama3.2`` or ``org/name``.
        folder: in place of the current one.

    Raises:
        ClexError: there is none of that name, or several.
    """
    models = _all(folder)  # a file that two programs share has two names
    exact = [model for model in models if model.name == name]
    matches = exact or [model for model in models if model.has_name(name)]
    if len({os.path.realpath(model.path) for model in matches}) == 1:
        return matches[0].path
    shown = escaped(name, 80)
    if matches:
        raise ClexError(f"{shown}: {len(matches)} models have this name: {', '.join(m.name for m in matches[:8])}")
    names = list(dict.fromkeys(model.name for model in models))
    close = [other for other in names if name.lower() in other.lower()][:3]
    close = close or difflib.get_close_matches(name, names, cutoff=0.5)
    if close:
        hint = f"did you mean {' or '.join(escaped(other, 60) for other in close)}?"
    elif models:
        hint = "`clex-chat` without a model lists those there are"
    else:
        hint = f"there are none in {places()}; `{how_to_get_one()}` gets one"
    raise ClexError(f"{shown}: no such file, and no model of this name is found; {hint}")


def line_of(model: FoundModel) -> ModelLine:
    """Read what there is to say of a model, from the header of its file."""
    try:
        size = model_bytes(model.path)
    except OSError as error:
        return ModelLine(0, fault=error.strerror or str(error))
    try:
        with GGUFFile(model.path) as file:
            tables = tables_of(file)
            context = tables.max_context_length if tables else ModelKeys(file).trained_context
            if file.get("general.type", "model") != "model" or not context:
                return ModelLine(size, fault="not a language model")
            return ModelLine(size, context, tables.method if tables else None)
    except ClexError as error:
        return ModelLine(size, fault=str(error).replace(f"{model.path}: ", "", 1))


def listing(lines: Iterable[tuple[FoundModel, ModelLine]]) -> str:
    """A table of models with what `line_of` says of each: name, size, context, tables, and where each is from."""
    rows = [("MODEL", "SIZE", "CONTEXT", "TABLES", "FROM")]
    for model, line in lines:
        fault = f" ({escaped(line.fault, 60)})" if line.fault else ""
        context = f"{line.context:,}" if line.context else "-"
        place = f"{model.place}{fault}"
        rows.append((escaped(model.name, 60), readable_size(line.size), context, line.tables or "-", place))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (1, 2)  # numbers
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def how_to_get_one() -> str:
    """A command that gets a model where there is none, of a program that is there."""
    if shutil.which("ollama"):
        return "ollama pull llama3.2"
    for hub in ("hf", "huggingface-cli"):
        if shutil.which(hub):
            return f"{hub} download {_REPOSITORY} {_FILE}"
    return f"curl -LO https://huggingface.co/{_REPOSITORY}/resolve/main/{_FILE}"


def places() -> str:
    """Where models are looked for, in words."""
    return "the current folder, Ollama's models, LM Studio's, and the cache of the Hugging Face hub"


def _in_folder(folder: Path) -> Iterator[FoundModel]:
    for path in gguf_files(folder):
        yield FoundModel(path.name, path, "this folder")


def _ollama() -> Iterator[FoundModel]:
    own = os.environ.get("OLLAMA_MODELS")
    usual = [_home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    for root in [Path(os.path.expanduser(own))] if own else usual:
        manifests = root / "manifests"
        for path in _files(manifests, deep=6):
            names = path.relative_to(manifests).parts
            if len(names) < 3 or (blob := _ollama_blob(path)) is None:
                continue
            *repository, tag = names
            for default in _OLLAMA_DEFAULTS:
                if repository and repository[0] == default:
                    repository = repository[1:]
            yield FoundModel(f"{'/'.join(repository)}:{tag}", root / "blobs" / blob, "Ollama")


def _ollama_blob(manifest: Path) -> str | None:
    """Name of the model's file, by a manifest; None where it is none."""
    try:
        with open(manifest, encoding="utf-8") as file:
            layers = json.loads(file.read(1 << 20))["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _OLLAMA_MODEL]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Not a path: what is foreign names nothing outside.
    usable = [digest for digest in digests if isinstance(digest, str) and _BLOB.fullmatch(digest)]
    return usable[0].replace(":", "-") if usable else None


def _lm_studio() -> Iterator[FoundModel]:
    home = _home()
    roots = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    try:
        pointed = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
        roots.insert(0, Path(pointed) / "models")
    except (OSError, ValueError):
        pass
    for root in dict.fromkeys(roots):
        for path in gguf_files(root, deep=3):
            yield FoundModel(path.relative_to(root).as_posix(), path, "LM Studio")


def _hub() -> Iterator[FoundModel]:
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    usual = Path(home) / "hub" if home else Path(cache) / "huggingface" / "hub"
    root = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or usual))
    for repository in _folders(root):
        kind, _, name = repository.name.partition("--")
        if kind != "models" or not name:
            continue
        seen: set[str] = set()  # a file of an older revision has the name of the newer one
        for snapshot in _snapshots(repository):
            for path in gguf_files(snapshot, deep=2):
                name_in = path.relative_to(snapshot).as_posix()
                if name_in not in seen:
                    seen.add(name_in)
                    yield FoundModel(f"{name.replace('--', '/')}/{name_in}", path, "hub cache")


def _snapshots(repository: Path) -> list[Path]:
    """The revisions of a repository: that of ``main`` first."""
    found = _folders(repository / "snapshots")
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    return sorted(found, key=lambda path: (path.name != main, path.name))


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # that name itself for an account without one: there is nothing then


def gguf_files(folder: Path, deep: int = 0) -> Iterator[Path]:
    """Models in a folder, and in those in it so many levels down: single files, and of split ones the first part."""
    for path in _files(folder, deep):
        if path.suffix == ".gguf" and not path.name.startswith("mmproj") and not is_later_part(path.name):
            yield path


def _files(folder: Path, deep: int) -> Iterator[Path]:
    """Files of a folder and of those in it, so many levels down, in the order of their names."""
    waiting, seen = [(folder, deep)], 0
    while waiting:
        place, left = waiting.pop()
        try:
            entries = sorted(place.iterdir())
        except (OSError, ValueError):  # a NUL in a path
            continue
        folders = []
        for path in entries:
            seen += 1
            if seen > 10 * MOST:
                return
            try:
                if path.is_file():
                    yield path
                elif left and path.is_dir() and not path.is_symlink():
                    folders.append((path, left - 1))
            except OSError:
                continue
        waiting += reversed(folders)


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())[:MOST]
    except OSError:
        return []
