"""``clex-chat``: talk to a model in a terminal, or ask it one thing from a script."""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported, for Ctrl-C there
    from clex_local import start

    start.clex_chat()

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clex_local.chat.commands import completions, do, path_in
from clex_local.chat.conversation import Chat
from clex_local.chat.line_editor import line_editor, plain_lines
from clex_local.chat.options import SCRIPT_TOKENS, ChatOptions
from clex_local.chat.question import Question, answer_once, asks_once
from clex_local.chat.terminal import Terminal, with_advice
from clex_local.commands.command import SETTINGS, Command, say
from clex_local.commands.command_options import given_options, options_from
from clex_local.commands.line_breaks import window_width
from clex_local.documents.attachments import Attachment, attach
from clex_local.documents.files import STANDARD_INPUT
from clex_local.errors import ClexError, escaped
from clex_local.model_file.baked import baked_in
from clex_local.model_file.found_models import found_models, how_to_get_one, line_of, listing, model_path, places
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.memory import kv_bytes
from clex_local.model_file.model_shape import ModelShape
from clex_local.model_file.table_support import why_no_tables
from clex_local.runtime.opening import open_model
from clex_local.runtime.run_options import RunOptions
from clex_local.runtime.sampling import Sampling
from clex_local.session.folder import KeptSession, sessions_folder
from clex_local.session.keeper import SessionKeeper
from clex_local.session.saved_session import SavedSession, SessionError
from clex_local.sizes import readable_size

if TYPE_CHECKING:
    from clex_local.runtime.llama import Llama


def _open(model: Path, options: RunOptions, quiet: bool) -> Llama:
    """Load the model; one who waits at a terminal is told so, unless `quiet`."""
    loading = not quiet and sys.stderr.isatty() and not options.verbose
    if loading:
        room = (window_width(sys.stderr) or 80) - len("loading  ... ")  # one line is taken back, and not two
        print(f"loading {escaped(model.name, max(room, 1))} ...", end="", file=sys.stderr, flush=True)
    try:
        return open_model(model, **vars(options))
    finally:
        if loading:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def converse(
    terminal: Terminal, keeper: SessionKeeper, model: Path, fitted: bool, attachments: Sequence[Attachment] = ()
) -> None:
    """Talk until the end of input.

    Args:
        terminal: where.
        keeper: of the conversation's file.
        model: the file.
        fitted: the size of the context was chosen by what fits in memory.
        attachments: what waits for the first message.
    """
    session = terminal.session
    llm = session.llm
    name = escaped(llm.metadata.get("general.name") or model.name, 100)
    with GGUFFile(model) as file:
        shape = ModelShape.from_metadata(file)
        extendable = not llm.clex and not why_no_tables(ModelKeys(file)) and not baked_in(file)
    cache = llm.settings.type_k
    if shape:
        size = kv_bytes(shape, session.capacity, cache, flash_attn=llm.settings.flash_attn)
        cache = f"{readable_size(size, memory=True)} {cache}"
    context = f"{session.capacity:,} tokens of context"
    if fitted and session.capacity < (covered := llm._model.n_ctx_train()):
        context += f" (the model covers {covered:,}, memory does not)"
    terminal.note(f"{name} · {context} · {cache} cache · /help")
    chat = Chat(terminal, name, cache, keeper)
    if extendable:
        terminal.note(
            f"no tables beyond {llm._model.n_ctx_train():,} tokens: --extend 4x makes some, clex-convert a file"
        )
    if keeper.kept and not keeper.kept.saved:
        terminal.note(f"a new session: {escaped(keeper.kept.name)}")
    keeper.describe(anew={file.path for attachment in attachments for file in attachment.files})
    chat.welcome()
    for attachment in attachments:
        chat.add(attachment)
    edit = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    chat.edits = edit
    read = line_editor(lambda line: completions(chat, line), path_in, chat.status) if edit else plain_lines
    chat.run(read, do)


def _list_models(context: click.Context, asks: bool) -> int:
    """Show the models there are, or how to get one, to somebody who names none and asks nothing."""
    if asks:
        hint = "clex-chat alone lists those there are"
        raise click.MissingParameter(hint, context, param_type="argument", param_hint="MODEL")
    models = found_models()
    if not models:
        command = context.command
        assert isinstance(command, Command)
        fault = (
            f"MODEL is missing, and none is found in {places()}; clex-chat FILE.gguf takes any other, this gets one:"
        )
        code = command.fail(fault)
        click.echo(how_to_get_one(), err=True)  # in one line also where that is longer than a window, to be copied
        return code
    lines = [(model, line_of(model)) for model in models]
    say(listing(lines))
    usable = [model for model, line in lines if not line.fault]
    if usable:
        extend = "; --extend 4x gives one without tables four times its context"
        plain = any(not line.fault and not line.tables for _, line in lines)
        say(f"clex-chat {shlex.quote(usable[0].name)} talks to one{extend if plain else ''}", err=True)
    return 0


def _open_session(name: str, context: click.Context, model: Path | None) -> tuple[KeptSession, Path]:
    """The conversation of a name, which is ours from now on, and the model to go on with.

    Raises:
        SessionError: it cannot be had, or its model is gone.
    """
    kept = KeptSession(sessions_folder(), name)
    context.call_on_close(kept.close)
    if model is None and kept.saved is None:
        hint = f"clex-chat MODEL --session {shlex.quote(name)} begins it"
        raise click.UsageError(escaped(f"there is no session {name} yet: MODEL is missing; {hint}", 300))
    if model is None and kept.saved:
        model = Path(kept.saved.model.path)
        if not model.is_file():
            raise SessionError(f"the model of the session {kept.name} is gone: {model}; name another before --session")
    assert model is not None
    return kept, model


def _as_before(
    saved: SavedSession, context: click.Context, sampling: Sampling, options: RunOptions, answering: ChatOptions
) -> tuple[Sampling, RunOptions, ChatOptions]:
    """The options of a conversation, but for those that were given.

    Raises:
        ClexError: another system message was given.
    """
    if answering.system not in (None, saved.system):
        raise ClexError(f"the session {saved.name} has another system message: leave out `system`")
    given = given_options(context, RunOptions)
    run = {name: value for name, value in saved.run.items() if name not in given and value is not None}
    if (model := context.params["model"]) and model_path(model).absolute() != Path(saved.model.path):
        # It may have tables of its own.
        run.pop("extend", None)
    template = (
        answering.chat_template if "chat_template" in given_options(context, ChatOptions) else saved.chat_template
    )
    return (
        replace(saved.sampling, **given_options(context, Sampling)),
        replace(options, **run),
        replace(answering, chat_template=template, system=saved.system),
    )


@click.command("clex-chat", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="Answer TEXT and leave.")
@click.option(
    "-f",
    "--file",
    "files",
    metavar="FILE",
    multiple=True,
    help="Put a file in front of the prompt: text, PDF, DOCX, HTML, a folder, or a pattern such as 'src/**/*.py'; - is "
    "standard input. Repeatable. Without a prompt, in a terminal it waits for your first message, elsewhere it is "
    "answered by itself.",
)
@click.option("--url", "urls", metavar="URL", multiple=True, help="Fetch a page or file of the web as one of -f.")
@click.option(
    "--session",
    "session_name",
    metavar="NAME",
    help="Go on with the conversation NAME, or begin it, and save it after every answer. Its model, system message, "
    "template and options are taken where none are given.",
)
@options_from(ChatOptions, name="answering")
@options_from(Sampling, name="sampling")
@options_from(RunOptions)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the answer, tokens and speed.")
@click.version_option(package_name="clex-local")
def main(
    model: Path | None,
    prompt: str | None,
    files: tuple[str, ...],
    urls: tuple[str, ...],
    session_name: str | None,
    answering: ChatOptions,
    sampling: Sampling,
    options: RunOptions,
    as_json: bool,
) -> int:
    """Chat with MODEL, a GGUF file, over contexts longer than it was trained for.

    It may be a model of Ollama, LM Studio or the Hugging Face hub's cache by its name. Without one, those are listed.

    With -p or input from a pipe it answers once, and prints nothing but the answer to standard output. What comes
    from a pipe, or from a file by <, is put in front of -f and -p.
    """
    context = click.get_current_context()
    if model is None and session_name is None:
        return _list_models(context, bool(prompt is not None or files or urls or as_json))
    # Read before the model is loaded, so that a wrong name costs no time.
    kept, model = _open_session(session_name, context, model) if session_name is not None else (None, model)
    if kept and kept.saved:
        sampling, options, answering = _as_before(kept.saved, context, sampling, options, answering)
    assert model is not None
    if answering.chat_template == "plain" and answering.system is not None:
        raise click.UsageError("--system needs a chat template, --chat-template plain has none")
    model = model_path(model)
    attachments = [*map(attach, files), *(attach(url, web=True) for url in urls)]
    once = asks_once(prompt, [*files, *urls], as_json)
    if as_json and prompt is None and not attachments and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("--json needs -p, -f or input from a pipe")
    question = Question.read(prompt, attachments, STANDARD_INPUT in files) if once else None
    from clex_local.store.documents import store_wanted  # with the library

    store = store_wanted(options.store)
    makes_store = store is not None and not store.exists()
    with closing(_open(model, options, quiet=question is not None)) as llm:
        from clex_local.templates.chat_template import TemplateError

        try:
            terminal = _terminal(llm, answering, sampling, question, as_json)
            run = SavedSession.run_of(options)
            keeper = SessionKeeper(terminal.session, terminal.tell, answering.chat_template, run, kept)
            context.call_on_close(keeper.close)
            keeper.resume()
        except TemplateError as error:
            raise with_advice(error) from error
        if question is not None:
            keeper.describe(changes_only=True, anew={file.path for file in question.files})
            return answer_once(terminal, question.text(), as_json, keeper, question.files)
        if makes_store and store and store.exists():
            terminal.note(
                f"what is read is kept in {escaped(str(store))}: clex-cache shows it, --no-store keeps nothing"
            )
        converse(terminal, keeper, model, options.ctx is None, attachments)
    return 0


def _terminal(
    llm: Llama, answering: ChatOptions, sampling: Sampling, question: Question | None, as_json: bool
) -> Terminal:
    """A conversation with a model, at a terminal or as a script asks.

    Raises:
        ClexError: the template is broken or refuses the system message.
    """
    from clex_local.session.session import Session
    from clex_local.templates.builtin import CHATML, PLAIN

    template = {"chatml": CHATML, "plain": PLAIN}.get(answering.chat_template)
    session = Session(llm, system=answering.system, template=template, sampling=sampling, stops_repetition=True)
    max_tokens = answering.max_tokens
    if max_tokens is None and question is not None:
        max_tokens = SCRIPT_TOKENS
    terminal = Terminal(
        session, max_tokens or None, quiet=as_json, plain=answering.plain, on_full=answering.on_full,
        talks=question is None,
    )  # fmt: skip
    if answering.chat_template == "model" and not session.has_own_template:
        terminal.note("this model has no chat template: it continues your text (--chat-template chatml tries ChatML)")
    return terminal
