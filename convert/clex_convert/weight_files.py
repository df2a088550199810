"""Which files of a model folder or repository hold its weights: those that transformers reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from clex_convert.errors import ConvertError
from clex_local.errors import one_line

# In the order in which transformers looks for them, each with the index of its shards right behind it.
_KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def first_choice(names: Collection[str]) -> str | None:
    """The file, or the index of shards, that transformers reads of those in a folder; None if it finds none.

    Source: ``_get_resolved_checkpoint_files`` of transformers' modeling_utils.py. Files that it does not look for are
    others' (consolidated.safetensors, adapter_model.safetensors) or variants (model.fp16.safetensors).
    """
    wanted = [name for start, end in _KINDS for name in (start + end, f"{start}{end}.index.json")]
    return next((name for name in wanted if name in names), None)


def shards_without_index(names: Collection[str], where: str) -> list[str]:
    """Shards that no index lists, which only their names tell of.

    Raises:
        ConvertError: some are missing, or there are those of several models.
    """
    for start, end in _KINDS:
        found = [match for name in names if (match := re.fullmatch(rf"{start}-(\d+)-of-(\d+)\{end}", name))]
        if not found:
            continue
        counts = {int(match[2]) for match in found}
        numbers = {int(match[1]) for match in found}
        if len(counts) > 1 or numbers != set(range(1, max(counts) + 1)):
            raise ConvertError(
                f"{where}: holds the shards {', '.join(sorted(match[0] for match in found)[:6])} and no index of them; "
                f"they are not all of one model: download {start}{end}.index.json and what is missing"
            )
        return sorted(match[0] for match in found)
    return []


def read_index(path: Path) -> dict[str, str]:
    """The shard of every tensor.

    Raises:
        ConvertError: the index cannot be read.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(part) for name, part in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read ({one_line(error)}); download it again") from None


def no_weights(where: str, names: Collection[str]) -> ConvertError:
    """The error for a folder without any, which names what is like them."""
    others = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    hint = f"; it holds {', '.join(others[:3])}, which transformers does not look for" if others else ""
    return ConvertError(f"{where}: holds no weights, neither model*.safetensors nor pytorch_model*.bin{hint}")
