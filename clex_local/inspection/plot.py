"""The picture of a model's tables: how far each bucket lowers each RoPE frequency."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clex_local.errors import ClexError, escaped
from clex_local.figure import PAGE_WIDTH, checked_name, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clex_local.inspection.inspection import Inspection

_MOST_MODELS = 6
_MOST_CURVES = 32
_MOST_NAMED = 8  # curves that a legend names one by one
_MOST_FREQUENCIES = 4096
_PALEST = 0.92  # of the colours: the last yellow is too pale for a line


def plot(found: Sequence[Inspection], output: str | os.PathLike[str]) -> None:
    """Draws the inverse frequencies of every bucket relative to t = 1, models side by side.

    Frequencies below the line "wavelength = context" do not complete a turn within that context. Those that do not
    complete one at t = 1 (shaded) show the model angles it was never trained on, as soon as the context is longer,
    unless a table lowers them.

    Args:
        found: what `clex_local.inspect` gives of models with tables.
        output: a name that ends with .png or .svg; replaced if it exists.

    Raises:
        ClexError: another ending, a model without tables, matplotlib is missing, or the file cannot be written.
    """
    output = checked_name(output)
    if not 0 < len(found) <= _MOST_MODELS:
        raise ClexError(f"{output}: a picture shows 1 to {_MOST_MODELS} models, not {len(found)}")
    for model in found:
        if model.tables is None:
            raise ClexError(f"{model.path}: has no tables to draw; clex-convert adds some")
        if not 1 < model.tables.inv_freq.shape[1] <= _MOST_FREQUENCIES:
            raise ClexError(f"{model.path}: {model.tables.inv_freq.shape[1]} frequencies cannot be drawn")
    columns = min(len(found), 2)
    rows = math.ceil(len(found) / columns)
    size = (6.4, 5.0) if columns == 1 else (PAGE_WIDTH, 4.0 * rows + 0.6)
    with new_figure(output, *size) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        drawn, empty = grid[: len(found)], grid[len(found) :]
        for axes, model in zip(drawn, found, strict=True):
            _draw(axes, model)
        for axes in empty:
            axes.set_axis_off()
        # One scale for all, so that models can be compared.
        limits = [axes.get_ylim() for axes in drawn]
        for axes in drawn:
            _set_scale(axes, min(low for low, _ in limits), max(high for _, high in limits))
        for k, axes in enumerate(drawn):
            if k % columns:
                axes.set_ylabel("")
            if k + columns < len(drawn):
                axes.set_xlabel("")
        _explain(figure, drawn, found, empty)


def _draw(axes: Any, model: Inspection) -> None:
    tables = model.tables
    assert tables is not None
    plain = tables.inv_freq[0].astype(np.float64)  # rad/token at t = 1
    original, dimensions = tables.original_context_length, np.arange(plain.size)
    factors = tables.scaling_factors.astype(np.float64)
    lengths = tables.context_lengths
    shown = _shown(model)
    named = len(shown) <= _MOST_NAMED
    norm, colours = _colour_scale(float(factors[-1]))
    low = high = 1.0
    for i in shown:
        colour = colours(_PALEST * float(norm(factors[i])))
        curve = tables.inv_freq[i] / plain
        low, high = min(low, float(curve.min())), max(high, float(curve.max()))
        label = f"t = {factors[i]:g}: up to {lengths[i]:,} tokens" if named else None
        axes.plot(dimensions, curve, color=colour, linewidth=1.8 if named else 1.1, label=label)
        own = _crossing(dimensions, np.log(2 * np.pi / tables.inv_freq[i] / (factors[i] * original)))
        if own is not None:
            axes.plot(own, np.interp(own, dimensions, curve), "o", color=colour, markersize=3.5, zorder=3)
    axes.plot([], [], "o", color="0.4", markersize=3.5, label="wavelength = the bucket's own context")

    # A frequency below such a line has a wavelength above the context.
    wavelengths = 2 * np.pi / plain  # tokens at t = 1
    for context, style in {original: "-", lengths[-1]: "--"}.items():
        label = f"wavelength = {context:,} tokens"
        axes.plot(dimensions, wavelengths / context, style, color="black", linewidth=1.1, label=label)
    boundary = _crossing(dimensions, np.log(wavelengths / original))
    if boundary is not None:
        axes.axvspan(boundary, dimensions[-1] + 0.5, color="0.5", alpha=0.14, linewidth=0)
        label = "extrapolates: no full turn in the original context"
        axes.plot([], [], "s", color="0.5", alpha=0.3, label=label)

    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.25)
    axes.set_xlim(-0.5, dimensions[-1] + 0.5)
    axes.set_xlabel("frequency i = 0 ... n_rot/2 - 1, the fastest first")
    axes.set_ylabel("inverse frequency relative to t = 1")
    axes.spines["right"].set_visible(False)
    _wavelength_axis(axes, dimensions, wavelengths)
    name = escaped(model.name or model.path.name, 36)
    axes.set_title(f"{name}, {escaped(tables.method, 20)}".replace("$", r"\$"), fontsize=9)


def _shown(model: Inspection) -> np.ndarray[Any, Any]:
    """The buckets that are drawn: all, or as many of them as can be told apart."""
    assert model.tables is not None
    count = len(model.tables.scaling_factors)
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_CURVES)).round().astype(int))


def _colour_scale(largest: float) -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    return LogNorm(1, max(largest, 1.0001)), colormaps["viridis"]


def _explain(figure: Figure, drawn: Sequence[Any], found: Sequence[Inspection], empty: Sequence[Any]) -> None:
    """A legend and a scale of colours for each picture, or for all of them where they are the same."""
    legends = [axes.get_legend_handles_labels() for axes in drawn]
    alike = len(drawn) > 1 and all(labels == legends[0][1] for _, labels in legends)
    if alike and empty:
        empty[0].legend(*legends[0], frameon=False, fontsize=9, loc="center")
    elif alike:
        figure.legend(*legends[0], frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    for axes in () if alike else drawn:
        columns = 2 if len(drawn) == 1 else 1
        axes.legend(frameon=False, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns)
    scaled = [(axes, model) for axes, model in zip(drawn, found, strict=True) if len(_shown(model)) > _MOST_NAMED]
    largest = {float(model.tables.scaling_factors[-1]) for _, model in scaled if model.tables}
    if len(scaled) == len(drawn) and len(largest) == 1:
        _colour_bar(figure, [*drawn, *empty], largest.pop(), aspect=40)
    else:
        for axes, model in scaled:
            assert model.tables is not None
            _colour_bar(figure, axes, float(model.tables.scaling_factors[-1]))


def _set_scale(axes: Any, low: float, high: float) -> None:
    axes.set_ylim(low, high)
    ticks = [tick for tick in (2, 1.5, 1, 0.75, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05, 0.03, 0.02, 0.01) if low < tick < high]
    if low > 0.003 and high < 3:
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _wavelength_axis(axes: Any, dimensions: np.ndarray[Any, Any], wavelengths: np.ndarray[Any, Any]) -> None:
    """The wavelengths at t = 1 along the upper edge, where they ascend as they should."""
    powers = np.arange(-3, 40)
    ascending = np.log10(wavelengths)
    if not (np.diff(ascending) > 0).all():
        return
    powers = powers[(powers > ascending[0]) & (powers < ascending[-1])]
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(np.interp(powers, ascending, dimensions), labels=[f"$10^{{{power}}}$" for power in powers])
    upper.set_xlabel("wavelength at t = 1 (tokens)")


def _colour_bar(figure: Figure, axes: Any, largest: float, aspect: float = 20) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    norm, colours = _colour_scale(largest)
    scale = ScalarMappable(norm, ListedColormap(colours(np.linspace(0, _PALEST, 256))))
    bar = figure.colorbar(scale, ax=axes, label="scaling factor t of the bucket", pad=0.02, aspect=aspect)
    ticks = [1.0, *(2.0**k for k in range(1, 24) if 2.0**k < largest / 1.3), largest]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.minorticks_off()


def _crossing(dimensions: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> float | None:
    """Where rising values first become 0, between dimensions; None if they do not."""
    above = np.flatnonzero(values > 0)
    if not above.size or above[0] == 0:
        return None
    i = above[0]
    return float(np.interp(0, values[i - 1 : i + 1], dimensions[i - 1 : i + 1]))
