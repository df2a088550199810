"""The tables of one source model, as the options and the model have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clex_convert.errors import ConvertError
from clex_convert.method_tables import ScalingError, original_context, tables
from clex_convert.methods import METHODS
from clex_convert.options import ConvertOptions
from clex_convert.rope_metadata import RopeMetadata, baked, with_tables
from clex_convert.scaling import kind_of
from clex_convert.source import Source
from clex_convert.weights import OdeSettings, OdeWeights, read_weights
from clex_local.model_file.tables import Tables


def model_tables(model: Source, options: ConvertOptions) -> Tables:
    """The tables that a model's file gets.

    Settings of a CLEX layer are taken from the options, then from the file of its weights, then from the model's
    config, then from the defaults of the authors' code.

    Raises:
        ConvertError: options that do not go with the model, weights that are missing or of no use.
    """
    method, weights_path = options.method, options.clex_weights
    if method not in (None, *METHODS):
        raise ConvertError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    weights = None
    if method is None or METHODS[method].needs_weights:
        weights = model.ode_weights() if weights_path is None else read_weights(Path(weights_path))
        if weights is None and method is None and options.rope_scaling is None:
            own = model.own_tables()
            if own is not None:
                return _existing_tables(own, model, options)
        if weights is None and method is None and kind_of(model.rope.facts.get("rope_scaling", {})) == "clex":
            raise ConvertError(
                f"{model.path}: its config names CLEX, but it has no CLEX layer; pass its weights with `clex_weights`, "
                'or `method="yarn"` for tables without training'
            )
    elif weights_path is not None:
        raise ConvertError(f'the method {method} has no weights; drop `clex_weights` or use `method="clex"`')
    if weights is not None:
        method = "clex"
    return _new_tables(method, weights, model, options)


def model_metadata(tables: Tables, model: Source, options: ConvertOptions) -> RopeMetadata:
    """What the file says of the rotary embedding: its tables, or the one that is baked.

    Raises:
        ConvertError: no table can be baked as the options say, or the model has a window that cannot be combined with
            so long a context.
    """
    if options.bake is None:
        metadata = with_tables(tables, model.gguf_architecture, model.rope)
    else:
        metadata = baked(tables, options.bake, model.gguf_architecture, model.rope)
    model.check_window(options.bake or tables.max_context_length)
    return metadata


def _existing_tables(own: Tables, model: Source, options: ConvertOptions) -> Tables:
    """The tables that a model has already; only their log scale is left to choose."""
    settings = options.ode_settings
    chosen = options.original_context is not None or options.factors is not None
    if chosen or settings != OdeSettings(log_scale=settings.log_scale):
        raise ConvertError(
            f"{model.path}: has tables already, which are kept as they are; pass `method` to make new ones"
        )
    return own if settings.log_scale is None else replace(own, log_scale=settings.log_scale)


def _new_tables(method: str | None, weights: OdeWeights | None, model: Source, options: ConvertOptions) -> Tables:
    rope, settings = model.rope, options.ode_settings
    usual = original_context(method, rope.scaling, rope.context)
    longest = max(usual, rope.context)
    context = usual if options.original_context is None else options.original_context
    if not 0 < context <= longest:
        raise ConvertError(
            f"{model.path}: the original context must be from 1 to the model's own {longest} tokens, not {context}"
        )
    if weights is not None:
        settings = settings.over(weights.settings).over(rope.settings)
    try:
        return tables(
            method,
            dim=rope.dim,
            base=rope.base,
            original_context=context,
            trained_context=usual,
            factors=options.factors,
            max_factor=settings.max_factor if options.factors is None else None,
            scaling=rope.scaling,
            head_dim=rope.head_dim,
            weights=weights,
            act=settings.act,
            time_dt=settings.time_dt,
            dynamics=settings.dynamics,
            log_scale=bool(settings.log_scale),
            source=rope.facts,
        )
    except ScalingError as error:
        raise ConvertError(f"{model.path}: {error}") from None
