"""Models of the Hugging Face hub: what a conversion needs of them, downloaded into the hub's own cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from clex_convert.errors import FULL, ConvertError, disk_full, extra_packages
from clex_convert.gguf_parts import part_names
from clex_convert.hub_client import broken_off, cached_snapshot, unreachable
from clex_convert.weight_files import first_choice, no_weights, read_index, shards_without_index
from clex_local.errors import one_line

# ``org/name`` or ``org/name/file.gguf``, and perhaps a revision.
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+\.gguf))?(@(?P<revision>[^@]+))?")
# All that llama.cpp's conversion reads beside the weights.
_SMALL = {
    *("config.json", "generation_config.json", "README.md"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
}


def fetch(source: str | os.PathLike[str]) -> Path:
    """The file or folder of a source, downloaded first where it names a model of the hub.

    Args:
        source: a path, which wins where it exists; or ``org/name``, ``org/name@revision`` or, for one GGUF file of a
            repository (all parts of a split one), ``org/name/file.gguf``. The hub's cache keeps them (``HF_HOME``).
            Safetensors are preferred to ``.bin``; nothing is downloaded that a conversion does not read. Without a
            network the cache alone is looked at.

    Raises:
        ConvertError: nothing of that name, no access to it, no network, no room; or a repository without weights.
    """
    path, match = Path(source), _ID.fullmatch(os.fspath(source))
    if path.exists():
        return path
    if match is None or (match["file"] is None and match["repo"].endswith(".gguf")):
        raise ConvertError(f"{source}: no such file or folder")
    with extra_packages():
        import huggingface_hub
    repo, file, revision = match["repo"], match["file"], match["revision"]
    with _worded(os.fspath(source), repo, revision), _few_words():
        cached = None
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision)
            names, commit = [sibling.rfilename for sibling in info.siblings or []], info.sha
        except unreachable():
            cached = cached_snapshot(repo, revision)
            names, commit = [str(found.relative_to(cached).as_posix()) for found in cached.rglob("*")], cached.name

        def get(name: str, of: str | None = commit) -> Path:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=of, local_files_only=cached is not None))

        if file is not None:
            first, *_ = [get(part, revision) for part in (part_names(file) if file in names else [file])]
            return first
        if not names:
            raise ConvertError(f"{repo}: the repository is empty")
        weights = _weights(repo, names, get)
        small = [name for name in names if name in _SMALL or re.fullmatch(r"additional_chat_templates/[^/]+", name)]
        # The first by the revision's own name, so that the cache knows which commit that is.
        *_, last = [get(name, commit if i else revision) for i, name in enumerate([*sorted(small), *weights])]
        return last.parent


def _weights(repo: str, names: list[str], get: Callable[[str], Path]) -> list[str]:
    chosen = first_choice(names)
    if chosen is not None:
        return [chosen, *_listed(get(chosen), names)] if chosen.endswith(".index.json") else [chosen]
    if shards := shards_without_index(names, repo):
        return shards
    ggufs = sorted({part_names(name)[0] for name in names if name.endswith(".gguf")})
    if ggufs:
        shown = ", ".join(ggufs[:20]) + (f" and {len(ggufs) - 20} more" if len(ggufs) > 20 else "")
        raise ConvertError(f"{repo}: holds GGUF files, no model folder; pick one as {repo}/FILE: {shown}")
    if "adapter_config.json" in names:
        raise ConvertError(f"{repo}: holds an adapter, not a model; download it and pass its folder with `lora`")
    raise no_weights(repo, names)


def _listed(index: Path, names: list[str]) -> list[str]:
    parts = sorted(set(read_index(index).values()))
    for part in parts:
        if part not in names:
            raise ConvertError(f"{index}: lists {part}, which is not there; download it, or ask for another revision")
    return parts


@contextlib.contextmanager
def _worded(source: str, repo: str, revision: str | None) -> Iterator[None]:
    """Words what the hub's client raises."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        reason = f"the repository is gated: accept its terms at {endpoint}/{repo}, then log in with: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = f"no such file or folder, and no such repository at {endpoint}; a private one needs: hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            reason = "no such file or folder, and not all of it is in the hub's cache; HF_HUB_OFFLINE forbids downloads"
        else:
            reason = f"no such file or folder, and {endpoint} cannot be reached; check the name and the network"
    except errors.EntryNotFoundError:
        reason = f"the repository {repo} has no such file"
    except errors.HFValidationError as error:
        reason = f"no such file or folder, and no name of a repository ({one_line(error)})"
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "an error"
        reason = f"{endpoint} answered {code}; try again later" + (", or: hf auth login" if code in (401, 403) else "")
    except broken_off() as error:
        reason = f"the download broke off ({one_line(error, 120)}); run the command again"
    except ConvertError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(constants.HF_HUB_CACHE) from None
        reason = f"could not be downloaded ({error.strerror or one_line(error)})"
    except Exception as error:  # such as those of the Xet client
        reason = f"could not be downloaded ({type(error).__name__}: {one_line(error)})"
    else:
        return
    raise ConvertError(f"{source}: {reason}")


@contextlib.contextmanager
def _few_words() -> Iterator[None]:
    """Keeps the client's warnings off the terminal; its progress bars stay."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
