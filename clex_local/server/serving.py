"""Models over HTTP, for programs that speak OpenAI's or Anthropic's API, and a page to chat on."""

from __future__ import annotations

import configparser
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from clex_local.commands.options import takes_options
from clex_local.errors import ClexError
from clex_local.library.devices import check_workers
from clex_local.model_file.found_models import gguf_files
from clex_local.server.options import ServeOptions
from clex_local.server.plan import ServePlan, plan_service, server_settings
from clex_local.server.process import Server, server_program

ModelPath: TypeAlias = "str | os.PathLike[str]"
_KEYS = ("--api-key", "--api-key-file")
_KEY_VARIABLES = ("LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE")


@takes_options(ServeOptions)
def serve(models: ModelPath | Sequence[ModelPath], options: ServeOptions) -> Server:
    """Serve models over HTTP until the server is closed; it is ready when this returns.

    One model is loaded at once. Of several, or of a folder, each is loaded when a request first names it, by its file's
    name without ``.gguf``, in place of the one before.

    Args:
        models: a GGUF file, a folder of them, or several of either.
        {options}

    Raises:
        ClexError: a file cannot be read or loaded, or does not cover ``ctx``, or memory does not hold what was asked
            for, or the address cannot be listened on, or others could reach it without a key.
    """
    return start_service(plan_models(models, options), options)


def plan_models(models: ModelPath | Sequence[ModelPath], options: ServeOptions) -> list[ServePlan]:
    """How each of the models is served. For `serve`, whose arguments and errors these are."""
    server_program()
    given = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    paths = [path for model in given for path in _files(Path(os.path.expanduser(model)))]
    names = [path.stem for path in paths]
    twice = {str(path) for path in paths if names.count(path.stem) > 1}
    if twice:
        raise ClexError(f"models of one name cannot be told apart: {', '.join(sorted(twice))}")
    _check_host(options)
    check_workers(options.rpc)
    return [plan_service(path, options) for path in paths]


def start_service(plans: Sequence[ServePlan], options: ServeOptions) -> Server:
    """Start the server that was planned."""
    if "--log-disable" in options.server_args:
        raise ClexError("--log-disable: the log says when the server is ready; only its warnings are shown anyway")
    arguments = ["--host", options.host, "--port", str(options.port), "--metrics"]
    if not any(argument.startswith("--cors-origins") for argument in options.server_args):
        arguments += ["--cors-origins", "localhost"]  # pages of the internet are not to use what has no key
    environment = {"LLAMA_CLEX_PREFIX_REUSE": options.prefix_reuse, **_store(options)}
    if options.api_key:
        environment["LLAMA_API_KEY"] = options.api_key  # arguments can be read by every user of the machine
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clex-serve-")))
        if len(plans) == 1:
            arguments += _as_arguments(server_settings(plans[0], options, folder))
        else:
            presets = folder / "models.ini"
            _write_presets(presets, plans, options)
            arguments += ["--models-preset", str(presets), "--models-max", "1"]
        server = Server([*arguments, *options.server_args], environment, verbose=options.verbose)
        server.keep(stack.pop_all())
    return server


def _store(options: ServeOptions) -> dict[str, str]:
    """What the server is told of the document store."""
    from clex_local.store.documents import (  # with the library, which a build without the server may lack
        size_limit,
        store_wanted,
    )

    folder = None if options.rpc else store_wanted(options.store)  # workers may compute other bits another time
    return {"LLAMA_CLEX_STORE": str(folder or ""), "LLAMA_CLEX_STORE_SIZE": str(size_limit() if folder else 0)}


def _files(model: Path) -> list[Path]:
    """The GGUF files of a folder, or the file; of a model in several files, the first."""
    if not model.is_dir():
        return [model]
    found = list(gguf_files(model))
    if not found:
        raise ClexError(f"{model}: there are no GGUF files in this folder")
    return found


def _check_host(options: ServeOptions) -> None:
    """Refuse to be reached by others without a key."""
    has_key = options.api_key or any(os.environ.get(name) for name in _KEY_VARIABLES)
    has_key = has_key or any(argument.split("=")[0] in _KEYS for argument in options.server_args)
    hosts = [host.strip() for host in options.host.split(",")]
    if not has_key and not all(_is_local(host) for host in hosts):
        raise ClexError(
            f"other machines reach `host={options.host}`, and could use the model without a key: pass `api_key`, "
            "or listen on `host=127.0.0.1`"
        )


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".sock"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, of whatever
        return False


def _as_arguments(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ((f"--{name}", value) if value else (f"--{name}",))]


def _write_presets(path: Path, plans: Sequence[ServePlan], options: ServeOptions) -> None:
    """A file from which llama-server's router takes its models and how each is run."""
    presets = configparser.ConfigParser(interpolation=None)
    for plan in plans:
        settings = server_settings(plan, options, path.parent)
        presets[Path(plan.path).stem] = {name: value or "true" for name, value in settings.items()}
    with path.open("w") as file:
        presets.write(file)
