"""The methods against the functions of transformers that compute the same frequencies, and the choice of factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_convert import ConvertError, frequencies, tables, weights
from clex_convert.methods import METHODS
from clex_convert.ode import Dynamics, integrate
from clex_convert.transformers_folder import set_rope_scaling
from clex_local.model_file.tables import Tables

pytestmark = pytest.mark.convert

DATA = Path(__file__).parent / "data"
LENGTH = 256
FACTORS = [1, 1.5, 2, 3.7, 16]
SHAPES = [(64, 10000.0), (128, 500000.0), (8, 1e6)]
BETAS = {"beta_fast": 16.0, "beta_slow": 2.0}
YARNS = [
    {},
    BETAS,
    {"attention_factor": 1.3},
    {"mscale": 0.7, "mscale_all_dim": 1.1},
    {"mscale": 0.7},
    {"truncate": False, **BETAS},
]


def theirs(kind: str, dim: int, base: float, seq_len: int | None = None, **keys: Any) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor by transformers, for a context of LENGTH before any scaling."""
    config = LlamaConfig(head_dim=dim, rope_theta=base, max_position_embeddings=LENGTH)
    outside = keys.pop("outside", {})
    config.update(outside)
    set_rope_scaling(config, {"rope_type": kind, **keys})
    inv_freq, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)
    return inv_freq.numpy(), attention


def assert_rows(made: Tables, rows: list[tuple[np.ndarray, float]]) -> None:
    assert len(made.inv_freq) == len(rows)
    np.testing.assert_allclose(made.inv_freq, [inv_freq for inv_freq, _ in rows], rtol=5e-6, atol=0)
    scales = [attention**2 for _, attention in rows]
    if made.attn_scale is None:
        assert scales == [1.0] * len(rows)
    else:
        np.testing.assert_allclose(made.attn_scale, scales, rtol=1e-6)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"dim": request.param[0], "base": request.param[1]}


# each method at each t


def test_linear_is_that_of_transformers(shape: dict[str, Any]) -> None:
    made = tables("linear", **shape, original_context=LENGTH, factors=FACTORS)
    assert_rows(made, [theirs("linear", **shape, factor=t) for t in FACTORS])
    assert made.attn_scale is None


@pytest.mark.parametrize("keys", YARNS, ids=str)
def test_yarn_is_that_of_transformers(shape: dict[str, Any], keys: dict[str, Any]) -> None:
    made = tables(
        "yarn", **shape, original_context=LENGTH, factors=FACTORS, scaling={"type": "yarn", "factor": 4, **keys}
    )
    assert_rows(made, [theirs("yarn", **shape, factor=t, **keys) for t in FACTORS])


@pytest.mark.parametrize("factor", [1, 2, 5.5])
def test_ntk_is_the_dynamic_scaling_of_transformers(shape: dict[str, Any], factor: float) -> None:
    made = tables(
        "ntk", **shape, original_context=LENGTH, factors=[1, 1.5, 2, 16], scaling={"type": "dynamic", "factor": factor}
    )
    assert_rows(made, [theirs("dynamic", **shape, factor=factor, seq_len=int(t * LENGTH)) for t in (1, 1.5, 2, 16)])
    if factor == 2:  # what it does where nothing is said
        plain = tables("ntk", **shape, original_context=LENGTH, factors=[1, 1.5, 2, 16])
        np.testing.assert_array_equal(plain.inv_freq, made.inv_freq)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("keys", [{}, {"attention_factor": 1.19}], ids=str)
def test_longrope_is_that_of_transformers(shape: dict[str, Any], keys: dict[str, Any], inside: bool) -> None:
    half = shape["dim"] // 2
    keys = {**keys, "short_factor": np.linspace(1, 1.5, half).tolist(), "long_factor": np.linspace(1, 9, half).tolist()}
    if inside:
        reference = {**keys, "factor": 8.0}
        made = tables(None, **shape, original_context=LENGTH, scaling={"type": "longrope", **reference})
    else:
        outside = {"original_max_position_embeddings": LENGTH, "max_position_embeddings": 8 * LENGTH}
        reference = {**keys, "outside": outside}
        scaling = {"type": "longrope", **keys, "original_max_position_embeddings": LENGTH, "factor": 8}
        made = tables("longrope", **shape, original_context=LENGTH, scaling=scaling)
    assert made.context_lengths == [LENGTH, 8 * LENGTH]
    assert_rows(made, [theirs("longrope", **shape, seq_len=n, **reference) for n in (LENGTH, LENGTH + 1)])


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FIXED = [
    ("linear", {"factor": 4.0}),
    ("llama3", LLAMA3),
    *(("yarn", {"factor": 4.0, "original_max_position_embeddings": LENGTH // 4, **keys}) for keys in YARNS),
    ("yarn", {"factor": 4.0}),
]


@pytest.mark.parametrize(("kind", "keys"), FIXED, ids=str)
def test_fixed_scaling_of_a_model_is_one_table(shape: dict[str, Any], kind: str, keys: dict[str, Any]) -> None:
    made = tables(None, **shape, original_context=LENGTH, scaling={"rope_type": kind, **keys})
    assert (made.method, made.context_lengths) == (kind, [LENGTH])
    assert_rows(made, [theirs(kind, **shape, **keys)])


@pytest.mark.parametrize(("kind", "keys"), [*FIXED[1:3], FIXED[4]], ids=str)
def test_ntk_and_linear_extend_a_model_from_its_own_scaling(
    shape: dict[str, Any], kind: str, keys: dict[str, Any]
) -> None:
    first, attention = theirs(kind, **shape, **keys)
    options: dict[str, Any] = {**shape, "original_context": LENGTH, "scaling": {"rope_type": kind, **keys}}
    even = np.arange(0, shape["dim"], 2)
    rows = [(first * (2 * t - 1) ** (-even / (shape["dim"] - 2)), attention) for t in range(1, 5)]
    assert_rows(tables("ntk", **options), rows)
    assert_rows(tables("linear", **options, factors=FACTORS), [(first / t, attention) for t in FACTORS])


def test_ntk_extends_linear_but_linear_takes_its_place() -> None:
    options: dict[str, Any] = {"dim": 64, "base": 1e4, "original_context": LENGTH}
    scaling = {"rope_type": "linear", "factor": 2.5}
    plain = frequencies.plain(64, 1e4)
    np.testing.assert_allclose(tables("ntk", **options, scaling=scaling).inv_freq[0], plain / 2.5, rtol=1e-6)
    made = tables("linear", **options, scaling=scaling)
    assert made.scaling_factors.tolist() == [1, 2, 2.5]
    np.testing.assert_allclose(made.inv_freq[0], plain, rtol=1e-6)


@settings(deadline=None)
@given(
    st.sampled_from(["ntk", "linear", "yarn"]),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(1.1, 1e7),
    st.integers(16, 2**20),
    st.lists(st.floats(1.001, 1000), max_size=4),
)
def test_longer_contexts_never_turn_faster(method: str, dim: int, base: float, context: int, more: list[float]) -> None:
    factors = [1, *sorted({round(t, 3) for t in more if t * context < 2**31})]
    made = tables(method, dim=dim, base=base, original_context=context, factors=factors)
    np.testing.assert_allclose(made.inv_freq[0], frequencies.plain(dim, base), rtol=1e-6)
    assert (np.diff(made.inv_freq, axis=0) <= 0).all()
    # no dimension is slowed by more than the context grows, or by NTK's stretch
    limit = 1 / (2 * made.scaling_factors - 1 if method == "ntk" else made.scaling_factors)
    assert (made.inv_freq >= limit[:, None] * made.inv_freq[0] * (1 - 1e-5)).all()
    for length, t in zip(made.context_lengths, factors, strict=True):
        assert np.floor(t * context) <= length <= t * context * (1 + 2e-7)


def test_a_factor_covers_every_token_that_it_names() -> None:
    """1.3 is a little less in float32."""
    made = tables("ntk", dim=8, base=1e4, original_context=1000, factors=[1, 1.3, 1.7])
    assert made.context_lengths == [1000, 1300, 1700]


# the method where none is chosen


@pytest.mark.parametrize(("head_dim", "wanted"), [(None, "yarn"), (8, "yarn"), (20, "ntk")])
def test_a_model_without_scaling_gets_what_reads_best_without_training(head_dim: int | None, wanted: str) -> None:
    sizes: dict[str, Any] = dict(dim=8, base=1e4, original_context=LENGTH)
    made, chosen = (tables(method, head_dim=head_dim, **sizes) for method in (None, wanted))
    assert made.method == wanted
    np.testing.assert_array_equal(made.inv_freq, chosen.inv_freq)


def test_weights_are_used_without_being_told() -> None:
    known = dict(np.load(DATA / "table_zero-64.npz"))
    sizes: dict[str, Any] = dict(dim=int(known["dim"]), base=float(known["base"]), original_context=LENGTH)
    made = tables(None, weights={key: known[key] for key in weights.NAMES}, max_factor=2, **sizes)
    assert made.method == "clex"


# the learned dynamics between whole factors


def learned(name: str, **options: Any) -> Tables:
    known = np.load(DATA / f"table_{name}.npz")
    return tables(
        "clex",
        dim=int(known["dim"]),
        base=float(known["base"]),
        original_context=4096,
        weights={key: known[key] for key in weights.NAMES},
        act=str(known["act"]),
        **options,
    )


@pytest.mark.parametrize("time_dt", [0.01, 0.03, 1.0])
def test_factors_between_change_nothing_at_the_whole_ones(time_dt: float) -> None:
    whole = learned("llama2-128", max_factor=4, time_dt=time_dt)
    finer = learned("llama2-128", factors=[1, 1.25, 1.333, 2, 2.5, 3, 3.999, 4], time_dt=time_dt)
    np.testing.assert_array_equal(finer.inv_freq[[0, 3, 5, 7]], whole.inv_freq)
    sparse = learned("llama2-128", factors=[1, 2.5, 4], time_dt=time_dt)
    np.testing.assert_array_equal(sparse.inv_freq, finer.inv_freq[[0, 4, 7]])


def test_factors_between_are_on_the_learned_path() -> None:
    """A step that is far finer gives the same, and the rows are in order."""
    factors = [1, 1.005, 1.5, 2.718, 3]
    made, fine = (learned("mixtral-128", factors=factors, time_dt=dt).inv_freq for dt in (0.01, 0.001))
    np.testing.assert_allclose(made, fine, rtol=1e-4)
    steps = np.abs(np.log(made[1] / made[0])).max(), np.abs(np.log(made[2] / made[0])).max()
    assert 0 < 20 * steps[0] < steps[1]


def test_an_untrained_layer_gives_the_closed_form_everywhere() -> None:
    factors = [1, 1.01, 1.1, 1.237, 2, 5.5, 8]
    closed = tables("ntk", dim=64, base=1e4, original_context=4096, factors=factors)
    dynamics = Dynamics(torch.ones(32, 64), torch.zeros(64, 32), "silu")
    np.testing.assert_allclose(integrate(dynamics, 1e4, np.array(factors), 0.01), closed.inv_freq, rtol=3e-5)


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_an_untrained_layer_around_yarn_is_yarn_at_every_factor(base: float) -> None:
    """To the precision of float32 whatever the step is, and with the attention factor."""
    common = dict(dim=64, base=base, original_context=512, factors=[1, 1.01, 1.237, 2, 5.5, 8, 16])
    layer = {"ode_up_proj": np.ones((32, 64), np.float32), "ode_down_proj": np.zeros((64, 32), np.float32)}
    closed = tables("yarn", **common)
    for time_dt in (0.05, 1.0):
        made = tables("clex", **common, weights=layer, dynamics="yarn", time_dt=time_dt)
        np.testing.assert_allclose(made.inv_freq, closed.inv_freq, rtol=5e-7)
        np.testing.assert_allclose(made.attn_scale, closed.attn_scale, rtol=1e-6)
    assert json.loads(made.provenance)["dynamics"] == "yarn"


def test_yarn_counts_turns_in_the_trained_context() -> None:
    """Whatever length the tables begin to scale at: they come sooner, and are the same."""
    common: dict[str, Any] = dict(dim=64, base=1e5, factors=[1, 2, 4, 8])
    usual = tables("yarn", **common, original_context=8192)
    sooner = tables("yarn", **common, original_context=4096, trained_context=8192)
    np.testing.assert_array_equal(sooner.inv_freq, usual.inv_freq)
    np.testing.assert_array_equal(sooner.attn_scale, usual.attn_scale)
    assert sooner.max_context_length == 32768
    other = tables("yarn", **common, original_context=4096)
    assert (other.inv_freq[1:] != usual.inv_freq[1:]).any()


def test_a_learned_layer_around_yarn_follows_its_equation() -> None:
    """d log f / dt is the learned part and YaRN's drift, -r / (t (t (1 - r) + r)), by finite differences."""
    known = np.load(DATA / "table_llama2-128.npz")
    weights_of = {key: known[key].astype(np.float64) for key in weights.NAMES}
    dim, t, step = int(known["dim"]), 2.5, 0.005
    made = tables(
        "clex",
        dim=dim,
        base=float(known["base"]),
        original_context=4096,
        weights={key: known[key] for key in weights.NAMES},
        act="tanh",
        dynamics="yarn",
        factors=[1, t - step, t, t + step],
    )
    logs = np.log(made.inv_freq.astype(np.float64))
    ramp = frequencies.yarn_ramp(dim, float(known["base"]), 4096)
    form = np.log(frequencies.plain(dim, float(known["base"])) * (1 - ramp + ramp / t))
    learned_part = np.tanh((logs[2] + form) @ weights_of["ode_up_proj"]) @ weights_of["ode_down_proj"]
    assert np.abs(learned_part).max() > 0.01
    expected = learned_part - ramp / (t * (t * (1 - ramp) + ramp))
    np.testing.assert_allclose((logs[3] - logs[1]) / (2 * step), expected, atol=3e-4)


# factors and parameters


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("ntk", {}, [1, 2, 3, 4]),
        ("yarn", {"max_factor": 3}, [1, 2, 3]),
        ("yarn", {"scaling": {"type": "yarn", "factor": 2.5}}, [1, 2, 2.5]),
        ("linear", {"scaling": {"type": "linear", "factor": 3}, "max_factor": 2}, [1, 2]),
        (None, {"scaling": {"type": "dynamic", "factor": 3.5}}, [1, 2, 3, 3.5]),
        ("ntk", {"scaling": {"type": "dynamic", "factor": 1}}, [1, 2, 3, 4]),
        ("ntk", {"scaling": {"type": "yarn", "factor": 8}}, [1, 2, 3, 4]),
        ("linear", {"max_factor": 1}, [1]),
    ],
)
def test_factors_where_none_are_given(method: str | None, options: dict[str, Any], wanted: list[float]) -> None:
    made = tables(method, dim=8, base=1e4, original_context=LENGTH, **options)
    assert made.scaling_factors.tolist() == wanted


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([], "must begin with 1 and ascend, not be none"),
        ([2, 4], "must begin with 1 and ascend, not 2, 4"),
        ([1, 2, 2], "must begin with 1 and ascend"),
        ([1, 3, 2], "must begin with 1 and ascend"),
        ([1, float("nan")], "must begin with 1 and ascend"),
        ([1, float("inf")], "must begin with 1 and ascend"),
        ([1, 1e6], "from 1 to 65536, not 1e\\+06"),
        ([1, 1 + 1e-9], "must ascend strictly"),
    ],
)
def test_factors_of_no_use_are_refused(factors: list[float], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        tables("ntk", dim=8, base=1e4, original_context=LENGTH, factors=factors)


YARN, LONG = {"type": "yarn", "factor": 4}, {"type": "longrope", "factor": 4, "short_factor": [1] * 4}
REFUSED: list[tuple[str | None, dict[str, Any], str]] = [
    ("longrope", {}, "pass its short_factor and long_factor with `rope_scaling`"),
    (
        "clex",
        YARN,
        "clex cannot be combined with a model that has the scaling yarn of its own; use `method` ntk, linear, ",
    ),
    (
        "yarn",
        {"type": "llama3", **LLAMA3},
        "yarn cannot be combined .* llama3 .* use `method` ntk, linear, or leave",
    ),
    ("yarn", {"type": "linear", "factor": 2}, "yarn cannot be combined"),
    ("ntk", {**LONG, "long_factor": [2] * 4}, "ntk cannot be combined .* use `method` longrope, or leave it out"),
    (None, {"type": "ntk-by-parts", "factor": 2}, "the RoPE scaling 'ntk-by-parts' is unknown; known: linear, dynamic"),
    (None, {"type": ["yarn"]}, "is unknown"),
    (None, {"type": "dynamic", "factor": 1, "alpha": 1000}, "the key alpha is unknown for 'dynamic' and may change"),
    (None, {**YARN, "extrapolation_factor": 0.5}, "the key extrapolation_factor is unknown"),
    (None, {"type": "yarn"}, "'yarn' needs the key factor"),
    (None, {"type": "yarn", "factor": None}, "'yarn' needs the key factor"),
    (None, {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
    (None, {"type": "linear", "factor": 0.5}, "factor must be a number of at least 1, not 0.5"),
    (None, {"type": "linear", "factor": "4"}, "factor must be a number of at least 1, not '4'"),
    (None, {"type": "linear", "factor": float("nan")}, "factor must be a number"),
    (None, {"type": "linear", "factor": True}, "factor must be a number"),
    (None, {**YARN, "attention_factor": 0}, "the attention factor must be above 0"),
    (None, {**YARN, "attention_factor": -1}, "attention_factor must be a number of at least 0, not -1"),
    (None, {**YARN, "beta_fast": 0.5}, "beta_fast must be above beta_slow"),
    (None, {**YARN, "truncate": 1}, "truncate must be true or false, not 1"),
    (None, {**YARN, "original_max_position_embeddings": 10.5}, "must be a number of tokens, not 10.5"),
    (None, {**LONG, "long_factor": [2] * 3}, "long_factor must hold 4 numbers, one for each frequency, it holds 3"),
    (None, {**LONG, "long_factor": "2222"}, "long_factor must hold 4 numbers, one for each frequency, it holds none"),
    (None, {**LONG, "long_factor": [2, 2, 0, 2]}, "long_factor must hold numbers above 0"),
    (
        None,
        {**LONG, "long_factor": [2] * 4, "factor": None},
        "needs the key factor or original_max",
    ),
]


@pytest.mark.parametrize(("method", "scaling", "message"), REFUSED)
def test_combinations_of_no_sense_are_refused(method: str | None, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message) as refusal:
        tables(method, dim=8, base=1e4, original_context=LENGTH, scaling=scaling)
    assert "\n" not in str(refusal.value)


def test_one_table_for_every_length_has_no_factors() -> None:
    with pytest.raises(ConvertError, match="llama3, is one table for every length: pass `method` \\(ntk, linear\\)"):
        tables(None, dim=8, base=1e4, original_context=LENGTH, scaling={"type": "llama3", **LLAMA3}, factors=[1, 2])
    with pytest.raises(ConvertError, match="`factors` and `max_factor` exclude each other"):
        tables("ntk", dim=8, base=1e4, original_context=LENGTH, factors=[1, 2], max_factor=2)


def test_an_attention_factor_needs_the_whole_head() -> None:
    options: dict[str, Any] = {"dim": 8, "base": 1e4, "original_context": LENGTH}
    with pytest.raises(ConvertError, match="acts on 8 of the 32 dimensions of a head; tables cannot do that: pass"):
        tables("yarn", **options, head_dim=32)
    without = tables("yarn", **options, head_dim=32, scaling={**YARN, "attention_factor": 1})
    assert without.attn_scale is None
    assert tables("yarn", **options, head_dim=8).attn_scale is not None


def test_every_method_is_tested_here() -> None:
    assert set(METHODS) == {"clex", "ntk", "linear", "yarn", "longrope"}
