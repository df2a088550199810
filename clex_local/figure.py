"""Figures of matplotlib in our style, written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clex_local.errors import ClexError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
PAGE_WIDTH = 8.0  # inches: a wider figure is scaled down where a page shows it, and its letters with it
# Okabe and Ito's colours, which colour-blind people tell apart as well, without the yellow, too pale for a line; and,
# for pages without colours, a marker for each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")
SHARES = "cividis"  # colours of shares from 0 to 1: their lightness grows, for whoever sees no other difference
# So that the same file gives the same bytes, whatever the user's own settings.
_STYLE: Any = {"svg.hashsalt": "clex-local", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}


def checked_name(output: str | os.PathLike[str]) -> Path:
    """The path of a picture.

    Raises:
        ClexError: it ends with neither .png nor .svg.
    """
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise ClexError(f"{output}: pictures are written as {' or '.join(FORMATS)}, by the name's ending")
    return output


def curve_style(number: int) -> dict[str, Any]:
    """How a curve is drawn that is told from the others by its number: colour, marker and line."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
    }


@contextmanager
def new_figure(output: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure in our style to draw on, width and height in inches; written to the output afterwards.

    Raises:
        ClexError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ClexError("a picture needs the Python package matplotlib: pip install 'clex-local[plot]'") from None

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name with letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        _save(figure, output)


def _save(figure: Any, output: Path) -> None:
    """Writes the picture beside its place and puts it there when it is complete; without a date, so reproducibly."""
    kind = output.suffix.lower()[1:]
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    fresh = output.parent / f".{output.name[:180]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        figure.savefig(fresh, format=kind, dpi=200, metadata=metadata)
        os.replace(fresh, output)
    except OSError as error:
        raise ClexError(f"{output}: could not be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            fresh.unlink()
