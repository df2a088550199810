"""A CLEX layer in stock transformers models: the authors' logits, whatever the cache, the batch and the precision."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import clex_convert
from clex_convert.frequencies import ntk, plain
from clex_convert.ode import whole_states
from clex_convert.transformers_folder import load_tokenizer
from clex_convert.weights import ACTIVATIONS, DYNAMICS
from clex_local import Llama
from clex_local.model_file.architectures import trainable_classes
from clex_local.model_file.tables import Tables
from clex_train import TrainError
from clex_train.layer import ClexLayer, ClexSettings
from clex_train.model import add_clex, clex_layer, load_model
from clex_train.saving import save_model
from clex_train.solution import trained_states
from helpers.device import llama_arguments
from helpers.low_level import F32
from helpers.tiny_models import LENGTH, Reference, kind_of, make_model
from test_architectures import MODELS

pytestmark = [pytest.mark.train, pytest.mark.folders]

GOLDEN = ["llama", "llama-log-scale", "mixtral", "phi2"]
SETTINGS = ClexSettings(max_factor=4, time_dt=0.25, log_scale=True)
COMPARED = [name for name in MODELS if f"{kind_of(name)}ForCausalLM" in trainable_classes()]


def trained(model: transformers.PreTrainedModel, settings: ClexSettings = SETTINGS) -> ClexLayer:
    """Adds a layer whose every weight is drawn."""
    torch.manual_seed(1)
    layer = add_clex(model, settings)
    torch.nn.init.normal_(layer.proj_func.ode_down_proj, std=0.02)
    return layer


@pytest.fixture(scope="module")
def llama(tmp_path_factory, golden_dir):
    """A tiny LLaMA with a layer, and token ids."""
    folder = tmp_path_factory.mktemp("llama")
    make_model("Llama", {}, folder, golden_dir("llama"))
    model = load_model(folder).eval()
    trained(model)
    return model


@pytest.fixture(scope="module")
def ids(golden_npz):
    return torch.tensor(golden_npz("llama")["ids"]).long()[None]


# the authors' numbers


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in GOLDEN), ("phi2", "eager")])
def test_one_pass_gives_the_authors_logits(golden_dir, golden_npz, name, attention):
    golden, model = golden_npz(name), load_model(golden_dir(name), attention=attention).eval()
    ids = torch.tensor(golden["ids"]).long()[None]
    with torch.no_grad():
        for key in (key for key in golden if key.startswith("full_")):
            logits = model(ids[:, : int(key[5:])]).logits[0, -4:]
            np.testing.assert_allclose(logits, golden[key], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_single_tokens_after_a_prompt_give_the_authors_logits(golden_dir, golden_npz, name):
    golden, model = golden_npz(name), load_model(golden_dir(name)).eval()
    ids, end, cache = torch.tensor(golden["ids"]).long()[None], int(golden["step_prefill"]), None
    start = 0
    with torch.no_grad():
        for expected in golden["steps"]:
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            np.testing.assert_allclose(out.logits[0, -1], expected, atol=2e-4, rtol=0)
            start, end, cache = end, end + 1, out.past_key_values


@pytest.mark.parametrize("name", GOLDEN)
def test_tables_are_the_authors(golden_dir, golden_npz, name):
    layer, expected = clex_layer(load_model(golden_dir(name))), golden_npz(name)["inv_freq"]
    with torch.no_grad():
        np.testing.assert_allclose(layer.frequencies(range(1, len(expected) + 1)), expected, rtol=1e-5)


# every architecture, against a cache of unrotated keys


@pytest.mark.parametrize("name", COMPARED)
def test_every_architecture_rotates_like_the_reference(golden_dir, ids, tmp_path, name):
    reference = make_model(name, MODELS[name][0], tmp_path, golden_dir(MODELS[name][1]))
    model = load_model(tmp_path).eval()
    layer = trained(model)
    with torch.no_grad():
        frequencies = layer.frequencies(range(1, 5)).numpy()
        tables = Tables("clex", LENGTH, np.arange(1, 5, dtype=np.float32), frequencies, log_scale=True)
        fed, cache, start = Reference(reference, tables), None, 0
        for end in (62, 63, 64, 65, 66, 150):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            expected = fed.feed(ids[0, start:end].numpy())
            np.testing.assert_allclose(out.logits[0, -1], expected, atol=5e-5, rtol=0)
            start, cache = end, out.past_key_values


def test_sliding_window_keeps_the_positions_of_its_keys(golden_dir, ids, tmp_path):
    """Single tokens against one pass, within one bucket: a window of 16 tokens drops keys from the cache."""
    make_model("Mistral", dict(sliding_window=16), tmp_path, golden_dir("llama"))
    model = load_model(tmp_path).eval()
    trained(model, ClexSettings(max_factor=4, time_dt=0.5))
    with torch.no_grad():
        expected, cache = model(ids[:, :60]).logits[0, -1], None
        for start, end in ((0, 50), *((n, n + 1) for n in range(50, 60))):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    np.testing.assert_allclose(out.logits[0, -1], expected, atol=5e-5, rtol=0)


# batches


def test_padded_rows_are_what_they_are_alone(llama, ids):
    """Each row has the table and the log scale of its own tokens, wherever the padding is."""
    lengths = (130, 60, 100)
    for side in ("left", "right"):
        rows = [torch.nn.functional.pad(ids[0, :n], (130 - n, 0) if side == "left" else (0, 130 - n)) for n in lengths]
        masks = [
            torch.nn.functional.pad(torch.ones(n), (130 - n, 0) if side == "left" else (0, 130 - n)) for n in lengths
        ]
        with torch.no_grad():
            logits = llama(torch.stack(rows), attention_mask=torch.stack(masks).long()).logits
            for row, n in enumerate(lengths):
                alone = llama(ids[:, :n]).logits[0, -1]
                np.testing.assert_allclose(logits[row, -1 if side == "left" else n - 1], alone, atol=5e-5, rtol=0)


def test_generate_gives_what_tokens_fed_one_by_one_give(llama, ids):
    """Greedy, from 60 tokens to 70, beyond the first bucket; in a batch with a longer row, and alone."""
    tokens, cache = ids[0, :60].tolist(), None
    with torch.no_grad():
        fed = torch.tensor([tokens])
        for _ in range(10):
            out = llama(fed, past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            fed, cache = torch.tensor([tokens[-1:]]), out.past_key_values
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert llama.generate(ids[:, :60], attention_mask=torch.ones(1, 60), **options)[0].tolist() == tokens
    rows = torch.stack([torch.nn.functional.pad(ids[0, :60], (40, 0)), ids[0, :100]])
    mask = torch.ones(2, 100).long()
    mask[0, :40] = 0
    assert llama.generate(rows, attention_mask=mask, **options)[0, 40:].tolist() == tokens


def test_cache_of_a_fixed_size_is_refused(llama, ids):
    with pytest.raises(ValueError, match="cache that grows"):
        llama.generate(ids[:, :10], max_new_tokens=2, cache_implementation="static", disable_compile=True)


# training


def test_rows_have_the_tables_of_their_factors(llama, ids):
    rows, positions = ids[:, :32].repeat(3, 1), torch.stack([torch.arange(32.0) * t for t in (1, 2, 3)])
    mask = torch.ones_like(rows)
    with torch.no_grad():
        together = llama(rows, position_ids=positions, attention_mask=mask, clex_factors=torch.tensor([1, 3, 4])).logits
        for row, t in enumerate((1, 3, 4)):
            one = slice(row, row + 1)
            alone = llama(
                rows[one], position_ids=positions[one], attention_mask=mask[one], clex_factors=torch.tensor([t])
            ).logits
            np.testing.assert_allclose(together[one], alone, atol=5e-5, rtol=0)
        assert (together[0] - together[1]).abs().max() > 0.1


def test_gradients_through_the_ode_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = ClexLayer(4, 10000.0, 64, ClexSettings(max_factor=3, time_dt=0.5)).double()
    torch.nn.init.normal_(layer.proj_func.ode_down_proj, std=0.3)
    weights = layer.proj_func.ode_up_proj, layer.proj_func.ode_down_proj
    assert weights[0].dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *_: layer.frequencies([2, 3]), weights, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("time_dt", [0.03, 0.5, 1.0])
def test_gradients_of_the_ode_are_those_of_autograd(dynamics, act, time_dt):
    """Through torchdiffeq's solver, recorded; steps of 0.03 end with a shorter one, and pass by the whole factors."""
    torch.manual_seed(0)
    layer = ClexLayer(16, 1e5, 64, ClexSettings(act=act, dynamics=dynamics)).double()
    torch.nn.init.normal_(layer.proj_func.ode_down_proj, std=0.1)
    found, wanted = (solve(layer.proj_func, layer.base, 4, time_dt) for solve in (trained_states, whole_states))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights, direction = list(layer.parameters()), torch.randn_like(wanted)
    gradients = [torch.autograd.grad((states * direction).sum(), weights) for states in (found, wanted)]
    assert min(gradient.abs().max() for gradient in gradients[1]) > 0.1
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_weights_have_a_gradient_where_nothing_is_learned():
    """At t = 1: otherwise a process whose rows are all there would leave the others waiting."""
    layer = ClexLayer(4, 10000.0, 64, ClexSettings(max_factor=3, time_dt=0.5))
    layer.frequencies([1, 1]).sum().backward()
    assert [weight.grad.abs().sum().item() for weight in layer.parameters()] == [0.0, 0.0]


def loss_of(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of 48 tokens spread over the positions of three times as many."""
    rows = ids[:, :48]
    logits = model(
        rows,
        position_ids=torch.arange(48.0)[None] * 3,
        attention_mask=torch.ones_like(rows),
        clex_factors=torch.tensor([3]),
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], rows[0, 1:])


def gradients(model: transformers.PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss_of(model, ids).backward()
    return [weight.grad.clone() for weight in model.parameters()]


def test_gradients_of_the_loss_reach_the_ode(llama, ids):
    """Of the whole model in float64, along the gradient of each matrix of the layer."""
    model = copy.deepcopy(llama).double().train()
    gradients(model, ids)
    layer = clex_layer(model)
    for weight in layer.parameters():
        slope = float(weight.grad.norm())
        direction, step = weight.grad / slope, 1e-5
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                losses.append(loss_of(model, ids))
                weight -= sign * step * direction
        numeric = float(losses[0] - losses[1]) / (2 * step)
        # norms compute in float32
        assert slope == pytest.approx(numeric, rel=5e-3)


def test_checkpointed_gradients_are_the_same(llama, ids):
    model = copy.deepcopy(llama).train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, wanted in zip(gradients(model, ids), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-5)


def test_untrained_layer_gives_the_closed_form():
    layer = ClexLayer(64, 1e6, 128, ClexSettings(max_factor=8, time_dt=0.05))
    expected = [ntk(plain(64, 1e6), 2 * t - 1) for t in range(1, 9)]
    with torch.no_grad():
        np.testing.assert_allclose(layer.frequencies(range(1, 9)), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_model_with_an_untrained_layer_around_yarn_is_yarns(golden_dir, ids, tmp_path, factor):
    """transformers' own YaRN, attention factor included, of a factor that is the length's."""
    make_model("Llama", {}, tmp_path, golden_dir("llama"))
    scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": LENGTH}
    yarn, model = load_model(tmp_path, scaling=scaling).eval(), load_model(tmp_path).eval()
    add_clex(model, ClexSettings(max_factor=4, time_dt=1.0, dynamics="yarn"))
    tokens = ids[:, : LENGTH * factor]
    with torch.no_grad():
        found, expected = (one(tokens).logits[0] for one in (model, yarn))
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


def test_rows_have_the_attention_factors_of_their_scaling_factors(golden_dir, ids, tmp_path):
    make_model("Llama", {}, tmp_path, golden_dir("llama"))
    model = load_model(tmp_path).eval()
    trained(model, ClexSettings(max_factor=4, time_dt=0.5, dynamics="yarn"))
    rows, positions = ids[:, :32].repeat(2, 1), torch.stack([torch.arange(32.0) * t for t in (1, 4)])
    given = dict(attention_mask=torch.ones_like(rows), position_ids=positions, clex_factors=torch.tensor([1, 4]))
    with torch.no_grad():
        together = model(rows, **given).logits
        for row in (0, 1):
            alone = model(**{name: value[row : row + 1] for name, value in given.items()}, input_ids=rows[:1]).logits
            np.testing.assert_allclose(together[row], alone[0], atol=5e-5, rtol=0)


@pytest.mark.parametrize("log_scale", [False, True], ids=["", "log scale"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_runtime_gives_the_models_logits_to_four_digits(golden_dir, ids, tmp_path, dynamics, log_scale):
    """Of a learned layer in transformers, and the file that is made of it: in every bucket, at their borders.

    Four of the pass's largest logit; both are as far from what float64 gives.
    """
    make_model("Llama", {}, tmp_path / "base", golden_dir("llama"))
    model = load_model(tmp_path / "base").eval()
    layer = trained(model, ClexSettings(max_factor=4, time_dt=0.25, dynamics=dynamics, log_scale=log_scale))
    save_model(model, layer, load_tokenizer(tmp_path / "base"), tmp_path / "out", None)
    model = load_model(tmp_path / "out").eval()
    assert clex_layer(model).settings.dynamics == dynamics
    path = clex_convert.convert(tmp_path / "out", tmp_path / "m.gguf", outtype="f32").path
    llm = Llama(str(path), n_ctx=256, logits_all=True, verbose=False, type_k=F32, type_v=F32, **llama_arguments())
    for n in (40, LENGTH, LENGTH + 1, 100, 2 * LENGTH, 2 * LENGTH + 1, 240, 4 * LENGTH):
        llm.reset()
        llm.eval(ids[0, :n].tolist())
        with torch.no_grad():
            expected = model(ids[:, :n]).logits[0].numpy()
        np.testing.assert_allclose(llm.scores[:n], expected, atol=5e-5 * np.abs(expected).max(), rtol=0)
    llm.close()


def test_layer_stays_in_float32(llama, ids):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        expected = clex_layer(model).frequencies([1, 2, 3, 4])
        model.to(torch.bfloat16)
        layer = clex_layer(model)
        assert {weight.dtype for weight in layer.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(layer.frequencies([1, 2, 3, 4]), expected)
        assert torch.isfinite(model(ids[:, :70]).logits).all()


def test_table_follows_the_weights(llama):
    layer = copy.deepcopy(clex_layer(llama))
    with torch.no_grad():
        before = layer.frequencies([4])
        layer.proj_func.ode_down_proj.mul_(2)
        assert (layer.frequencies([4]) - before).abs().max() > 0


# what cannot be


def test_dynamics_that_diverge_are_named():
    layer = ClexLayer(8, 10000.0, 64, ClexSettings(max_factor=4, act="silu", time_dt=0.5))
    torch.nn.init.constant_(layer.proj_func.ode_up_proj, -1e4)
    torch.nn.init.constant_(layer.proj_func.ode_down_proj, -1e30)
    with pytest.raises(TrainError, match=r"diverge: the frequencies at t = 2 are not finite"):
        layer.frequencies([3])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Falcon", {}, "cannot be added to FalconForCausalLM; supported: LlamaForCausalLM, "),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scaled already .rope_scaling is linear"),
        ("Phi", {"partial_rotary_factor": 0.5}, r"only \d+ of the \d+ dimensions of a head are rotated"),
    ],
)
def test_models_that_cannot_have_a_layer(golden_dir, tmp_path: Path, name, changes, message):
    make_model(name, changes, tmp_path, golden_dir("phi2" if name == "Phi" else "llama"))
    with pytest.raises(TrainError, match=message):
        add_clex(load_model(tmp_path), replace(SETTINGS, dynamics="yarn"))


def test_second_layer_is_refused(llama):
    with pytest.raises(TrainError, match="rope_scaling is clex"):
        add_clex(llama, SETTINGS)
