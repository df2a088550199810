"""``clex-cache``: show, remove and check the documents that were computed and kept on disk."""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported, for Ctrl-C there
    from clex_local import start

    start.clex_cache()

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clex_local.commands.command import SETTINGS, Command, Group, json_line, say
from clex_local.errors import ClexError, escaped
from clex_local.model_file.kv_types import cache_name
from clex_local.sizes import readable_size

if TYPE_CHECKING:
    from clex_local.store.documents import Document, DocumentStore

Function = TypeVar("Function", bound=Callable[..., Any])
_SHORTEST = 8  # digits of a name that are shown


def _json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


@click.group("clex-cache", cls=Group, invoke_without_command=True, no_args_is_help=False, context_settings=SETTINGS)
@click.option("--show", is_flag=True, help="Show how each text begins.")
@_json_option
@click.version_option(package_name="clex-local")
@click.pass_context
def main(context: click.Context, show: bool, as_json: bool) -> None:
    """List the documents that models have read and that are kept on disk, so that they are not read again.

    A document is a text as one model has computed it: the longest one, where one text goes on from another. Other
    programs may use them meanwhile. CLEX_CACHE says where they are.
    """
    if context.invoked_subcommand is not None:
        if show or as_json:
            raise click.UsageError("options come after the command")
        return
    with _store() as store:
        found = store.documents() if store else []
    names = short_names(document.name for document in found)
    if as_json:
        sys.stdout.write(json_line({"folder": str(_folder()), "documents": [_facts(item, show) for item in found]}))
        return
    if not found:
        say(f"no documents in {_folder()}")
    for title, documents in _by_model(found).items():
        say(title)
        skipped = _common_beginning([item.begin for item in documents])
        for item in documents:
            cache = cache_name(item.type_k, item.type_v)
            used = datetime.fromtimestamp(item.used).strftime("%Y-%m-%d %H:%M")
            size = readable_size(item.size)
            say(f"  {names[item.name]}  {item.tokens:>9,} tokens  {size:>8}  {used}  {cache}")
            if show:
                say(f"    {'…' * (skipped > 0)}{escaped(' '.join(item.begin[skipped:].split()))}")


@main.command("rm", cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--model", metavar="NAME", help="Remove all documents of a model: its name, or the digits after it.")
@_json_option
def rm(names: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Remove documents: each NAME is as many digits as tell it from others.

    What another document begins with too stays. The text is read again when it is asked about.
    """
    if not names and model is None:
        raise click.UsageError("name a document, or a --model")
    with _store() as store:
        found = store.documents() if store else []
        chosen = [_named(name, found) for name in names]
        if model is not None:
            of_model = [item for item in found if model == item.model or item.model_id.startswith(model.lower())]
            if not of_model or not model:
                raise ClexError(f"no documents of a model {escaped(model)}")
            chosen += of_model
        # Removed by another process meanwhile is removed too.
        freed = sum((store and store.remove(name)) or 0 for name in dict.fromkeys(item.name for item in chosen))
    _say_removed(len({item.name for item in chosen}), freed, as_json)


@main.command("clear", cls=Command)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_json_option
def clear(yes: bool, as_json: bool) -> None:
    """Remove all documents."""
    with _store() as store:
        number = len(store.documents()) if store else 0
        if not yes and number:
            if not sys.stdin.isatty():
                raise click.UsageError("nobody is there to be asked: --yes removes all documents")
            click.confirm(f"Remove {_documents(number)}?", abort=True, err=True)
        freed = store.clear() if store else 0
    _say_removed(number, freed, as_json)


@main.command("check", cls=Command)
@_json_option
def check(as_json: bool) -> None:
    """Read every file and compare its checksum; what is damaged, or can be reached no more, is removed."""
    with _store() as store:
        result = store.check() if store else None
    facts = asdict(result) if result else {"files": 0, "size": 0, "damaged": 0, "orphans": 0}
    if as_json:
        sys.stdout.write(json_line(facts))
        return
    files = f"{facts['files']:,} file{'s' * (facts['files'] != 1)}, {readable_size(facts['size'])}"
    if not facts["damaged"] and not facts["orphans"]:
        say(f"{files}: all whole")
    else:
        say(f"{files}: removed {facts['damaged']:,} damaged and {facts['orphans']:,} that nothing leads to any more")


@main.command("stats", cls=Command)
@_json_option
def stats(as_json: bool) -> None:
    """Show how much is kept, and how much may be."""
    folder = _folder()
    with _store() as store:
        found = store.documents() if store else []
        limit = store.stats.limit if store else None
    facts = {
        "folder": str(folder),
        "documents": len(found),
        "models": len({item.model_id for item in found}),
        "tokens": sum(item.tokens for item in found),
        "size": _bytes_in(folder),
        "limit": limit,
        "free": shutil.disk_usage(folder).free if folder.is_dir() else None,
    }
    if as_json:
        sys.stdout.write(json_line(facts))
        return
    say(f"folder     {folder}")
    say(f"documents  {facts['documents']:,} of {facts['models']:,} model{'s' * (facts['models'] != 1)}, "
        f"{facts['tokens']:,} tokens")  # fmt: skip
    say(f"size       {readable_size(facts['size'])}" + (f" of at most {readable_size(limit)}" if limit else ""))
    if facts["free"] is not None:
        say(f"free       {readable_size(facts['free'])} on this disk")


def _documents(number: int) -> str:
    return f"{number} document{'s' * (number != 1)}"


def _say_removed(number: int, freed: int, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json_line({"removed": number, "freed": freed}))
    else:
        say(f"{_documents(number)} removed, {readable_size(freed)} freed")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Of each name, the first digits that tell it from the others."""
    ordered = sorted(names)
    result = {}
    for before, name, after in zip(["", *ordered], ordered, [*ordered[1:], ""], strict=False):
        same = max(_alike([name, other]) for other in (before, after))
        result[name] = name[: max(_SHORTEST, same + 1)]
    return result


def _alike(texts: list[str]) -> int:
    """Characters that all texts begin with."""
    shortest = min(map(len, texts))
    return next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), shortest)


def _common_beginning(texts: list[str]) -> int:
    """Characters that all texts begin with, up to a word: in chats, what the template says before the first message."""
    if len(set(texts)) < 2:
        return 0
    same = texts[0][: _alike(texts)]
    return max(same.rfind(" "), same.rfind("\n")) + 1


def _named(name: str, found: Iterable[Document]) -> Document:
    """The one document whose name begins so.

    Raises:
        ClexError: there is none, or several.
    """
    fitting = [item for item in found if name and item.name.startswith(name.lower())]
    if len(fitting) != 1:
        problem = f"{len(fitting)} documents have names that begin with" if fitting else "there is no document"
        raise ClexError(f"{problem} {escaped(name)}; clex-cache lists them")
    return fitting[0]


def _by_model(found: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents under the names of their models, with as much of the hash as tells those of one name apart."""
    result: dict[str, list[Document]] = {}
    for item in found:
        title = f"{escaped(item.model) or 'a model without a name'} ({item.model_id[:_SHORTEST]})"
        result.setdefault(title, []).append(item)
    return result


def _facts(item: Document, show: bool) -> dict[str, Any]:
    facts = asdict(item)
    if not show:
        del facts["begin"]
    return facts


def _folder() -> Path:
    from clex_local.store.documents import store_folder

    return store_folder()


@contextmanager
def _store() -> Iterator[DocumentStore | None]:
    """The store, for a block; None where there is none: looking at it makes none. Folders left empty by it go."""
    if not _folder().exists():
        yield None
        return
    from clex_local.store.documents import DocumentStore

    with DocumentStore() as store:
        yield store
    _remove_empty(store.folder)


def _remove_empty(folder: Path) -> None:
    """Remove folders of models that have no document any more; those of other things stay."""
    for model in folder.glob("[0-9a-f]" * 16):
        for path in [*model.glob("[0-9a-f]" * 2), model]:
            with suppress(OSError):  # not empty, or no folder
                path.rmdir()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
