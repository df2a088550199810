"""Draws the pictures of docs/ from what is in the repository: the tables of its documents, and examples/bytes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from benchmarks.markdown import table_in
from clex_local import inspect
from clex_local.commands.command import SETTINGS, Command
from clex_local.inspection.plot import plot

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BYTES, MAX_FACTOR = ROOT / "examples" / "bytes", 16  # what benchmarks/small_model.py trained once
METHODS_TABLE = "methods: made by benchmarks/evaluation.py"
PASS_KEYS_TABLE = "pass keys: share found, in percent"
LONG_CHAT_TABLE = "{}: made by benchmarks/long_chat_evaluation.py"
# Of the methods those that a picture can show together.
DRAWN = ("plain RoPE", "PI, trained at 8x", "NTK, not trained", "YaRN, not trained", "YaRN, trained at 8x", "**CLEX**")
# Those whose ODE is fast are far off at 32x, and would hide how the others differ.
TRAINED_ALIKE = (
    "plain RoPE, trained with skips",
    "NTK, trained like CLEX",
    "**CLEX**",
    "YaRN, trained like CLEX",
    "CLEX around YaRN",
)


def tokens(heading: str) -> int:
    """The context length that a column's heading names: ``4x (1,024)`` or ``1,024``."""
    return int(heading.strip(")").split("(")[-1].replace(",", ""))


def _wide(curves: Mapping[str, Sequence[float | None]]) -> bool:
    """Whether the values of curves are so far apart that a logarithmic axis is needed."""
    found = [value for curve in curves.values() for value in curve if value is not None]
    return max(found) > 4 * min(found)


def draw_perplexities(output: Path, drawn: Sequence[str] = DRAWN) -> None:
    """Perplexity by context length of some methods, out of docs/evaluation.md."""
    from clex_eval.report import plot_curves

    (_, *headings), *rows = table_in(DOCS / "evaluation.md", METHODS_TABLE)
    lengths = [tokens(heading) for heading in headings]
    curves = {name: [float(cell.split()[0]) for cell in cells] for name, *cells in rows if name in drawn}
    plot_curves(
        output,
        "Perplexity of Emma per byte, Q8_0, by context length",
        lengths,
        {name.strip("*"): curves[name] for name in drawn if name in curves},
        "context length (bytes)",
        "perplexity",
        marks={f"trained context, {lengths[0]}": lengths[0]},
        log_y=_wide(curves),
    )


def draw_pass_keys(output: Path, document: str = "clex-eval.md", marker: str = PASS_KEYS_TABLE) -> None:
    """Pass keys found by length and depth, out of docs/clex-eval.md or another page."""
    from clex_eval.report import plot_heat_map

    (_, _, *headings), *rows = table_in(DOCS / document, marker)
    found: dict[str, dict[float, list[float | None]]] = {}
    for model, depth, *cells in rows:
        shares = [float(cell) / 100 if cell else None for cell in cells]
        found.setdefault(model, {})[float(depth.rstrip(" %"))] = shares
    depths = sorted({depth for of_model in found.values() for depth in of_model})
    nothing: list[float | None] = [None] * len(headings)
    values = [[of_model.get(depth, nothing) for depth in depths] for of_model in found.values()]
    plot_heat_map(output, list(found), [tokens(heading) for heading in headings], depths, values)


def draw_dynamics(output: Path) -> None:
    """The tables of the trained dynamics beside closed forms for the same model."""
    from clex_convert import convert

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = shutil.copytree(BYTES, folder / "bytes")
        config = json.loads((BYTES / "config.json").read_text(encoding="utf-8"))
        (plain / "config.json").write_text(json.dumps(config | {"rope_scaling": None}), encoding="utf-8")
        files = []
        for method, source in (("clex", BYTES), ("ntk", plain), ("yarn", plain)):
            files.append(folder / f"{method}.gguf")
            more = {} if method == "clex" else {"method": method, "max_factor": MAX_FACTOR}
            convert(source, files[-1], pre_tokenizer="gpt-2", check="none", **more)
        plot([inspect(path) for path in files], output)


def draw_long_chat(output: Path, table: str, title: str, xlabel: str) -> None:
    """Perplexity of the chat models by context length or by position, out of docs/long-chat.md; nothing without any."""
    from clex_eval.report import plot_curves

    measured = table_in(DOCS / "long-chat.md", LONG_CHAT_TABLE.format(table))
    if not measured:
        return
    (_, *headings), *rows = measured
    x = [tokens(heading) for heading in headings]
    curves = {name.strip("*"): [float(cell) if cell else None for cell in cells] for name, *cells in rows}
    plot_curves(
        output, title, x, curves, xlabel, "perplexity",
        marks={"trained context, 8,192": 8192}, log_x=table == "perplexity", log_y=_wide(curves),
    )  # fmt: skip


def draw_long_chat_pass_keys(output: Path) -> None:
    """Pass keys that the chat models find, out of docs/long-chat.md; nothing without any."""
    marker = LONG_CHAT_TABLE.format("pass keys by depth")
    if table_in(DOCS / "long-chat.md", marker):
        draw_pass_keys(output, "long-chat.md", marker)


LONG_CHAT = {
    "long-chat-perplexity.svg": partial(
        draw_long_chat,
        table="perplexity",
        title="Perplexity of Emma per token, Q8_0, by context length",
        xlabel="context length (tokens)",
    ),
    "long-chat-positions.svg": partial(
        draw_long_chat,
        table="positions",
        title="Perplexity of Emma per token in windows of 32,768, Q8_0, by position",
        xlabel="position, up to",
    ),
    "long-chat-passkey.svg": draw_long_chat_pass_keys,
}
EVALUATION = {
    "evaluation.svg": draw_perplexities,
    "evaluation-trained.svg": partial(draw_perplexities, drawn=TRAINED_ALIKE),
    "dynamics.svg": draw_dynamics,
}
DRAW = {**EVALUATION, "passkey.svg": draw_pass_keys, **LONG_CHAT}


@click.command("pictures", cls=Command, context_settings=SETTINGS)
@click.argument("folder", type=click.Path(path_type=Path), default=DOCS)
def main(folder: Path) -> None:
    """Draw the pictures into FOLDER, docs/ unless it is given; docs/tables.svg is what README says."""
    for name, draw in DRAW.items():
        draw(folder / name)


if __name__ == "__main__":
    main()
