"""The files of a GGUF model: one, or the parts of a split model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from clex_convert.errors import ConvertError
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.split_files import part_name, split_name


def part_names(name: str) -> list[str]:
    """Names of all parts of a split model, in their order, by the name of one; of another file its own."""
    part = split_name(name)
    if part is None:
        return [name]
    prefix, _, count = part
    return [part_name(prefix, number, count) for number in range(1, count + 1)]


def first_parts(folder: Path) -> list[Path]:
    """The GGUF models in a folder: single files, and of split models the first parts that are there."""
    models: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        part = split_name(path.name)
        models.setdefault((part[0], part[2]) if part else (path.name, 0), path)
    return list(models.values())


def open_parts(path: Path) -> list[GGUFFile]:
    """Opens a GGUF file, and where it is a part of a split model all parts of it, in their order.

    Args:
        path: the file, or any one of the parts.

    Returns:
        The open files; the first has the model's keys. They are to be closed.

    Raises:
        GGUFError: a file is not GGUF, or damaged.
        ConvertError: a part is missing or misnamed, or the parts are not those of one model.
    """
    with ExitStack() as stack:
        file = stack.enter_context(GGUFFile(path))
        count = _count(file)
        if count == 1:
            stack.pop_all()
            return [file]
        prefix = _prefix(file, count)
        files: list[GGUFFile] = []
        for number in range(1, count + 1):
            part = path.with_name(part_name(prefix, number, count))
            if not part.is_file():
                raise ConvertError(f"{part}: part {number} of the {count} of a split model is missing; put it there")
            files.append(stack.enter_context(GGUFFile(part)))
            _check_part(files, number, count)
        _check_tensors(files)
        stack.pop_all()
        file.close()  # opened again as one of the parts
        return files


def _count(file: GGUFFile) -> int:
    count = file.get("split.count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConvertError(f"{file.path}: split.count must be a number of parts, not {str(count)[:40]!r}")
    return max(count, 1)  # llama-gguf-split --merge leaves 0


def _prefix(file: GGUFFile, count: int) -> str:
    number, part = file.get("split.no"), split_name(file.path.name)
    if part and part[2] == count and file.path.name == part_name(*part):
        return part[0]
    number = number + 1 if isinstance(number, int) else 1
    raise ConvertError(
        f"{file.path}: one of {count} parts of a split model, but its name does not say so; rename it to end in "
        f"{part_name('', number, count)}"
    )


def _check_part(files: list[GGUFFile], number: int, count: int) -> None:
    """Checks the last of these parts against its place and against the first."""
    first, file = files[0], files[-1]
    if _count(file) != count:
        raise ConvertError(f"{file.path}: belongs to another model: it is one of {_count(file)} parts, not of {count}")
    no = file.get("split.no")
    if no != number - 1:
        said = f"part {no + 1}" if isinstance(no, int) else "no part"
        raise ConvertError(f"{file.path}: is {said} by its key split.no, not part {number} as its name says")
    for key in file.keys() if file is not first else []:
        # Tools give later parts the keys split.* alone, or all of them.
        if key == "split.no" or str(file.kind(key)).endswith("[]"):
            continue
        if key in first and first.get(key) != file.get(key):
            raise ConvertError(f"{file.path}: belongs to another model than {first.path.name}: its {key} is another")


def _check_tensors(files: list[GGUFFile]) -> None:
    holders: dict[str, GGUFFile] = {}
    for file in files:
        for tensor in file.tensors:
            other = holders.setdefault(tensor.name, file)
            if other is not file:
                raise ConvertError(f"{file.path}: holds the tensor {tensor.name}, which {other.path.name} holds too")
    wanted = files[0].get("split.tensors.count", len(holders))
    if wanted != len(holders):
        raise ConvertError(
            f"{files[0].path}: the parts hold {len(holders)} tensors in all, not {wanted} as split.tensors.count says; "
            "they are not those of one model"
        )
