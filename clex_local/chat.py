"""``clex-chat``: talk to a model in a terminal, or ask it one thing from a script."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clex_local.baked import baked_in
from clex_local.command import INTERRUPTED, SETTINGS, Command, say
from clex_local.errors import ClexError, escaped
from clex_local.gguf_file import GGUFFile
from clex_local.memory import KV_TYPES, ModelShape, gib, kv_bytes, plan_context, trained_context
from clex_local.tables import named_tables
from clex_local.terminal import Chat, Terminal, json_line, line_editor, plain_lines, printable, with_advice
from clex_local.text_input import Piped, join, read_text

if TYPE_CHECKING:
    from clex_local.llama import Llama
    from clex_local.session import Answer, Session


def open_model(
    path: str | os.PathLike[str],
    ctx: int | None = None,
    *,
    kv_type: str | None = None,
    flash_attn: bool | None = None,
    batch: int = 512,
    threads: int | None = None,
    threads_batch: int | None = None,
    gpu_layers: int | None = None,
    seed: int = -1,
    verbose: bool = False,
) -> Llama:
    """Load a model with a context that its tables and the memory hold.

    Args:
        path: a GGUF file.
        ctx: tokens the context holds; 0 for all the model covers, None for as many of them as fit comfortably.
        kv_type: type of the key and value cache, a name from ``memory.KV_TYPES``; None takes F16, or q8_0 where only
            that fits.
        flash_attn: None takes what is faster and fits.
        batch: prompt tokens computed at once.
        threads: threads to compute with; None takes the physical cores.
        threads_batch: threads to read prompts with; None takes ``threads``.
        gpu_layers: layers computed on a GPU, -1 for all; None is all if the library supports a GPU, otherwise none.
        seed: of the sampler, -1 for a different one each time.
        verbose: write llama.cpp's log to stderr, and the settings chosen.

    Raises:
        ClexError: the file cannot be read or loaded, or does not cover ``ctx``, or memory does not hold it.
    """
    with GGUFFile(path) as file:
        tables = named_tables(file, path)
        shape = ModelShape.from_metadata(file)
        trained, baked = trained_context(file), baked_in(file)
    maximum = tables.max_context_length if tables else trained
    if not maximum:
        raise ClexError(f"{path}: not a language model (it has no context length)")
    if ctx and ctx > maximum and tables:
        reach = f"{tables.original_context_length:,} at t = 1, t up to {tables.scaling_factors[-1]:g}"
        raise ClexError(f"{path} covers {maximum:,} tokens ({reach}), not the {ctx:,} asked for")
    if ctx and ctx > maximum and baked:
        raise ClexError(
            f"{path} is baked for {maximum:,} tokens, not the {ctx:,} asked for; convert the model that it was made of"
        )
    if ctx and ctx > maximum:
        raise ClexError(
            f"{path} was trained for {maximum:,} tokens and has no tables to cover the {ctx:,} asked for; "
            f"`clex-convert MODEL OUT.gguf` adds them"
        )

    import llama_cpp

    from clex_local.llama import Llama

    offload = llama_cpp.llama_supports_gpu_offload()
    if gpu_layers is None:
        gpu_layers = -1 if offload else 0
    plan = plan_context(
        shape,
        maximum,
        ctx,
        kv_type=kv_type,
        flash_attn=flash_attn,
        batch=batch,
        n_gpu_layers=gpu_layers if offload else 0,
        weights=os.path.getsize(path),
    )
    kv = KV_TYPES[plan.kv_type][0]
    try:
        llm = Llama(
            model_path=str(path),
            n_ctx=plan.n_ctx,
            n_batch=batch,
            n_threads=threads,
            n_threads_batch=threads_batch,
            n_gpu_layers=gpu_layers,
            type_k=kv,
            type_v=kv,
            flash_attn=plan.flash_attn,
            verbose=verbose,
        )
    except (ClexError, ValueError, RuntimeError, MemoryError) as error:
        hint = "; if it is the GPU's memory, pass fewer --n-gpu-layers" if offload and gpu_layers else ""
        raise ClexError(f"{error}{hint}") from error
    # Not the constructor's argument: it takes 0 for "random".
    llm.set_seed(seed if seed >= 0 else llama_cpp.LLAMA_DEFAULT_SEED)
    if not verbose:
        # The bindings print warnings even when they are told not to.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return llm


def answer_once(terminal: Terminal, text: str, as_json: bool = False) -> int:
    """Ask one thing and write the answer to stdout; returns the exit code.

    Raises:
        ClexError: the prompt cannot be answered.
        BrokenPipeError: nobody reads stdout any more.
    """
    code = 0

    def write(piece: str) -> None:
        if not as_json:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

    try:
        terminal.answer(text, write)
    except KeyboardInterrupt:
        code = INTERRUPTED
    answer = terminal.session.last
    if answer is None:  # interrupted before anything began
        return code
    if as_json:
        sys.stdout.write(json_line(report(terminal.session, answer)))
    elif answer.text and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    terminal.end_of_answer(answer)
    return code


def report(session: Session, answer: Answer) -> dict[str, Any]:
    """What ``--json`` prints: the answer, why it ended, tokens, settings, times, speeds, and the tables' state."""
    clex = session.llm.clex
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "context": session.capacity,
        "settings": asdict(session.llm.settings),
        "timings": {
            "prefill_seconds": round(answer.prefill_seconds, 4),
            "prefill_tokens_per_second": round(answer.prefill_speed, 2),
            "decode_seconds": round(answer.decode_seconds, 4),
            "decode_tokens_per_second": round(answer.decode_speed, 2),
        },
        "clex": clex
        and {
            "method": clex.method,
            "original_context": clex.original_context,
            "max_context": clex.max_context,
            "buckets": list(clex.buckets),
            "bucket": clex.bucket,
            "rerotations": clex.rerotations,
            "rerotated_cells": clex.rerotated_cells,
            "rerotation_ms": round(clex.rerotation_ms, 3),
        },
    }


TEMPLATES = ["model", "chatml", "plain"]


@click.command("clex-chat", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--ctx",
    metavar="N",
    type=click.IntRange(min=0),
    show_default="as many of them as fit in memory",
    help="Tokens the context holds; 0: all that the model covers.",
)
@click.option("-p", "--prompt", metavar="TEXT", help="Answer TEXT and leave.")
@click.option(
    "-f",
    "--file",
    "files",
    metavar="FILE",
    multiple=True,
    help="Put a text file in front of the prompt, or answer it by itself; - is standard input. Repeatable.",
)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="when the model ends it",
    help="End an answer after N tokens.",
)
@click.option(
    "--temp",
    metavar="X",
    type=click.FloatRange(min=0),
    default=0.8,
    help="Temperature; 0 takes the likeliest token.",
)
@click.option(
    "--top-k",
    metavar="N",
    type=click.IntRange(min=0),
    default=40,
    help="Likeliest tokens to draw from; 0: all.",
)
@click.option(
    "--top-p",
    metavar="X",
    type=click.FloatRange(0, 1),
    default=0.95,
    help="Nucleus sampling; 1: off.",
)
@click.option(
    "--min-p",
    metavar="X",
    type=click.FloatRange(0, 1),
    default=0.05,
    help="Smallest probability, relative to the likeliest token's; 0: off.",
)
@click.option(
    "--repeat-penalty",
    metavar="X",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="Penalty on tokens used lately; 1: off.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(-1, 2**32 - 2),
    default=-1,
    help="Seed of the sampling; -1: a new one each time.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="the physical cores",
    help="Threads to compute with.",
)
@click.option(
    "--threads-batch",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="as --threads",
    help="Threads to read prompts with.",
)
@click.option(
    "--n-gpu-layers",
    metavar="N",
    type=click.IntRange(min=-1),
    show_default="all if there is a GPU",
    help="Layers computed on a GPU; -1: all.",
)
@click.option(
    "--kv-type",
    metavar="TYPE",
    type=click.Choice(list(KV_TYPES)),
    show_default="f16, or q8_0 where only that fits",
    help=f"Type of the key and value cache: {', '.join(KV_TYPES)}.",
)
@click.option(
    "--flash-attn/--no-flash-attn", default=None, show_default="where it is faster or needed", help="Flash attention."
)
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(min=1),
    default=512,
    help="Prompt tokens computed at once.",
)
@click.option(
    "--chat-template",
    metavar="NAME",
    type=click.Choice(TEMPLATES),
    default="model",
    help="How messages become a prompt: model (its own template), chatml, or plain (the text is continued).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the answer, tokens and speed.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log, and the settings chosen.")
@click.version_option(package_name="clex-local")
def main(
    model: Path,
    ctx: int | None,
    prompt: str | None,
    files: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int,
    threads: int | None,
    threads_batch: int | None,
    n_gpu_layers: int | None,
    kv_type: str | None,
    flash_attn: bool | None,
    batch: int,
    chat_template: str,
    as_json: bool,
    verbose: bool,
) -> int:
    """Chat with MODEL, a GGUF file, over contexts longer than it was trained for.

    With -p, -f or input from a pipe it answers once, and prints nothing but the answer to standard output. What comes
    from a pipe, or from a file by <, is put in front of -f and -p.
    """
    if chat_template == "plain" and system is not None:
        raise click.UsageError("--system needs a chat template, --chat-template plain has none")
    asked = prompt is not None or bool(files)
    once = asked or sys.stdin is None or not sys.stdin.isatty()
    if as_json and not once:
        raise click.UsageError("--json needs -p, -f or input from a pipe")
    message = ""
    piped = None
    if once:
        # Read before the model is loaded, so that a wrong name costs no time.
        message = join([*map(read_text, files if asked else ("-",)), prompt or ""])
        if asked and "-" not in files:
            piped = Piped()
        if not message and not (piped and piped.text().strip()):
            raise ClexError("the prompt is empty")
    loading = not once and sys.stderr.isatty() and not verbose
    if loading:
        print(f"loading {escaped(model.name)} ...", end="", file=sys.stderr, flush=True)
    try:
        llm = open_model(
            model,
            ctx,
            kv_type=kv_type,
            flash_attn=flash_attn,
            batch=batch,
            threads=threads,
            threads_batch=threads_batch,
            gpu_layers=n_gpu_layers,
            seed=seed,
            verbose=verbose,
        )
    finally:
        if loading:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    from clex_local.session import CHATML, PLAIN, Sampling, Session
    from clex_local.templates import TemplateError

    with closing(llm):
        try:
            session = Session(
                llm,
                system=system,
                template={"chatml": CHATML, "plain": PLAIN}.get(chat_template),
                sampling=Sampling(temp, top_k, top_p, min_p, repeat_penalty),
            )
        except TemplateError as error:
            raise with_advice(error) from error
        terminal = Terminal(session, max_tokens, quiet=as_json)
        if chat_template == "model" and not session.has_own_template:
            terminal.note(
                "this model has no chat template: it continues your text (--chat-template chatml tries ChatML)"
            )
        if piped:
            message = join([piped.text(), message])
            if piped.unread:
                say(f"[{piped.unread}: answered without it; -f - reads it]", err=True)
        if once:
            return answer_once(terminal, message, as_json)
        name = escaped(llm.metadata.get("general.name") or model.name, 100)
        with GGUFFile(model) as file:
            shape = ModelShape.from_metadata(file)
        cache = llm.settings.type_k
        if shape:
            cache = f"{gib(kv_bytes(shape, session.capacity, cache))} {cache}"
        chat = Chat(terminal, name, cache)
        context = f"{session.capacity:,} tokens of context"
        if ctx is None and session.capacity < (covered := llm._model.n_ctx_train()):
            context += f" (the model covers {covered:,}, memory does not)"
        terminal.note(f"{name} · {context} · {cache} cache · /help")
        edit = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        chat.run(line_editor(chat) if edit else plain_lines)
    return 0


if __name__ == "__main__":
    main()
