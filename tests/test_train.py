"""clex-train: what is drawn, read, learned, saved, continued and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from datasets import Dataset
from safetensors.torch import load_file, save_file

import clex_convert
from clex_local import Llama
from clex_local.errors import ClexError
from clex_local.model_file.tables import read_tables
from clex_train import TrainError
from clex_train.cli import main
from clex_train.data import load_sequences
from clex_train.model import clex_layer, load_model
from clex_train.options import TrainOptions
from clex_train.positions import draw_positions
from clex_train.train import TrainResult, train
from clex_train.trainer import ClexTrainer, PositionSampler
from helpers.device import llama_arguments
from helpers.low_level import F32
from helpers.tiny_models import SIZES, make_model
from helpers.training_steps import watched_steps

pytestmark = [pytest.mark.train, pytest.mark.folders, pytest.mark.usefixtures("datasets_cache")]

UP, DOWN = (f"model.clex_layer.proj_func.ode_{name}_proj" for name in ("up", "down"))
# A step of the ODE's integration per unit of t, and few tokens: fast.
FAST: dict[str, Any] = dict(length=24, max_factor=3, time_dt=1.0, batch_size=4, log_steps=1)
QUICK = dict(learning_rate=3e-3, ode_learning_rate=1e-3, warmup_ratio=0.0, max_steps=4, **FAST)


@pytest.fixture(scope="module")
def base(tmp_path_factory, golden_dir) -> Path:
    """A tiny LLaMA without a layer, of 64 tokens."""
    folder = tmp_path_factory.mktemp("base") / "base"
    make_model("Llama", dict(hidden_size=64, intermediate_size=96), folder, golden_dir("llama"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and {i * i % 97} make {(i + i * i) % 97}.\n" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(base, text, tmp_path_factory) -> tuple[TrainResult, list[str]]:
    """A training of a few steps, and what it reported."""
    lines: list[str] = []
    options = {**QUICK, "max_steps": 12, "factors_per_batch": 2}
    return train(base, tmp_path_factory.mktemp("done") / "out", text=[text], **options, report=lines.append), lines


def run(*arguments: Any) -> tuple[int, str]:
    """Exit status and all output of clex-train."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# positions


def draw(kind: str, length: int, original: int, factor: int, seed: int = 0) -> np.ndarray:
    return draw_positions(kind, length, original, factor, torch.Generator().manual_seed(seed)).double().numpy()


@pytest.mark.parametrize("length", [2, 3, 30])
@pytest.mark.parametrize("factor", [1, 2, 16])
def test_random_positions_are_the_authors(length, factor):
    drawn = draw("random", length, 64, factor)
    assert drawn[0] == 0
    assert drawn[-1] == length * factor - 1
    assert (np.diff(drawn) >= 1).all()
    assert (drawn == np.round(drawn)).all()
    assert len(drawn) == length
    if length == 30 and factor > 1:
        assert (drawn != draw("random", length, 64, factor, seed=1)).any()


def test_random_positions_reach_every_one():
    drawn = np.concatenate([draw("random", 6, 64, 2, seed) for seed in range(200)])
    assert np.unique(drawn).tolist() == list(range(12))


def test_long_sequences_spread_over_the_span_of_the_context():
    for kind in ("random", "uniform", "chunked"):
        whole, part = draw(kind, 40, 40, 4), draw(kind, 40, 10, 4)
        np.testing.assert_allclose(part, whole / 4)


def test_uniform_positions_are_evenly_spaced():
    np.testing.assert_allclose(draw("uniform", 5, 64, 5), [0, 6, 12, 18, 24])


def test_positions_without_extrapolation():
    np.testing.assert_array_equal(draw("none", 100, 10, 4), np.arange(100))


def test_chunked_positions_skip_at_most_three_times():
    ends = []
    for seed in range(300):
        drawn = draw("chunked", 12, 64, 8, seed)
        steps = np.diff(drawn)
        assert drawn[0] == 0
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 3
        ends.append(drawn[-1])
    assert max(ends) <= 12 * 8 - 1
    assert max(ends) > 12 * 8 - 6


@pytest.mark.parametrize("kind", ["random", "uniform", "chunked"])
@pytest.mark.parametrize("factor", [1, 4])
def test_short_sequences_reach_the_positions_of_the_span(kind, factor):
    """Those of a sequence of 40 tokens, at t = 1 too; a span that is shorter than the sequence changes nothing."""
    generator = torch.Generator()
    ends = []
    for seed in range(100):
        drawn = draw_positions(kind, 10, 40, factor, generator.manual_seed(seed), span=40)
        assert len(drawn) == 10
        assert drawn[0] == 0
        assert (drawn.diff() >= 1).all()
        ends.append(float(drawn[-1]))
    assert 40 * factor - 8 < max(ends) <= 40 * factor - 1
    whole, same = (draw_positions(kind, 10, 40, factor, generator.manual_seed(1), span=s) for s in (None, 10))
    torch.testing.assert_close(whole, same, rtol=0, atol=0)


def test_draws_depend_on_the_key_alone():
    sampler = PositionSampler("random", 64, 16, 3, seed=5)
    positions, factors = sampler.draw(7, 20, 3, 0, 0)
    again = sampler.draw(7, 20, 3, 0, 0)
    torch.testing.assert_close((positions, factors), again, rtol=0, atol=0)
    assert positions[:, -1].tolist() == [20 * t - 1 for t in factors.tolist()]
    drawn = [
        sampler.draw(7, 20, step, part, rank)[1][:3].tolist()
        for step in range(30)
        for part in (0, 1)
        for rank in (0, 1)
    ]
    assert {t for three in drawn for t in three} == set(range(1, 17))
    assert len({tuple(three) for three in drawn}) > 100
    assert PositionSampler("none", 64, 16, 3, 5).draw(4, 200, 0)[1].tolist() == [4] * 4


# text


def test_documents_are_packed_without_loss(golden_dir, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(golden_dir("phi2"))
    texts = ["One, two.\r\n", "Drei – vier!\n\nfünf", "six"]
    for number, one in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(one.encode())
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    documents = Dataset.from_dict({"text": texts})
    documents.save_to_disk(tmp_path / "saved")
    expected = [token for one in texts for token in [*tokenizer(one)["input_ids"], tokenizer.eos_token_id]]
    expected = expected[: len(expected) // 5 * 5]
    for arguments in ((files, None), ([], str(tmp_path / "saved"))):
        for streaming in (False, True):
            rows = load_sequences(*arguments, tokenizer, 5, streaming=streaming)
            found = [row["input_ids"] for row in rows]
            assert all(len(row) == 5 for row in found)
            if not streaming:
                assert [token for row in found for token in row] == expected
            assert sorted(token for row in found for token in row) == sorted(expected)


def test_changed_file_is_read_again(golden_dir, tmp_path):
    tokenizer, path = transformers.AutoTokenizer.from_pretrained(golden_dir("phi2")), tmp_path / "a.txt"
    path.write_text("aaaaaaaa")
    before = load_sequences([path], None, tokenizer, 2)[0]
    path.write_text("bbbbbbbb")
    assert load_sequences([path], None, tokenizer, 2)[0] != before


# learning


def test_few_steps_lower_the_loss_and_move_the_ode(done, base):
    result, lines = done
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == result.steps == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    trained, plain = load_file(result.path / "model.safetensors"), load_file(base / "model.safetensors")
    assert trained[DOWN].abs().max() > 1e-3
    assert {trained[UP].dtype, trained[DOWN].dtype} == {torch.float32}
    assert trained.keys() == {*plain, UP, DOWN}
    assert not result.path.with_name("out.checkpoints").exists()
    assert os.listdir(result.path.parent) == ["out"]


def test_saved_folder_has_the_authors_layout(done):
    config = json.loads((done[0].path / "config.json").read_text())
    scaling = {"type": "clex", "max_factor": 3, "param_factor": 1, "act": "tanh", "time_dt": 1.0, "factor": 1}
    assert config["rope_scaling"] == scaling
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 64
    assert config["log_scale"] is False


def test_saved_folder_converts_to_the_same_tables(done, tmp_path):
    path = clex_convert.convert(done[0].path, tmp_path / "m.gguf", outtype="f32").path
    tables = read_tables(path)
    with torch.no_grad():
        expected = clex_layer(load_model(done[0].path)).frequencies([1, 2, 3])
    np.testing.assert_allclose(tables.inv_freq, expected, rtol=1e-6)
    assert tables.original_context_length == 64


def test_layer_of_its_own_learning_rate(base, text, tmp_path):
    """At 0 it stays untrained; otherwise Adam's first step is as large, and weight decay does not touch it."""
    options = {**QUICK, "max_steps": 1, "factors_per_batch": 4, "weight_decay": 100.0}
    weights = {}
    for rate in (0.0, 1e-3):
        train(base, tmp_path / str(rate), text=[text], **{**options, "ode_learning_rate": rate})
        weights[rate] = load_file(tmp_path / str(rate) / "model.safetensors")
    assert weights[0.0][DOWN].abs().max() == 0
    assert weights[1e-3][DOWN].abs().max() == pytest.approx(1e-3, rel=1e-2)
    # nothing moves it while the other matrix is zero
    torch.testing.assert_close(weights[1e-3][UP], weights[0.0][UP], rtol=0, atol=0)


def test_layer_decays_towards_its_closed_form(done, text, tmp_path):
    """By the learning rate times the decay; Adam's own step does not know of it."""
    options = dict(text=[text], **{**QUICK, "max_steps": 1}, weight_decay=50.0)
    before = load_file(done[0].path / "model.safetensors")
    weights = {}
    for decay in (0.0, 100.0):
        train(done[0].path, tmp_path / str(decay), ode_weight_decay=decay, **options)
        weights[decay] = load_file(tmp_path / str(decay) / "model.safetensors")
    torch.testing.assert_close(weights[100.0][DOWN] - weights[0.0][DOWN], -0.1 * before[DOWN], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(weights[100.0][UP], weights[0.0][UP], rtol=0, atol=0)


def test_layer_around_yarn(base, text, tmp_path):
    """What is trained, saved, converted and trained further is one and the same, and untrained it is YaRN."""
    options = {**QUICK, "text": [text], "max_steps": 2}
    result = train(base, tmp_path / "out", dynamics="yarn", **options)
    assert json.loads((result.path / "config.json").read_text())["rope_scaling"]["dynamics"] == "yarn"
    tables = read_tables(clex_convert.convert(result.path, tmp_path / "m.gguf", outtype="f32").path)
    layer = clex_layer(load_model(result.path))
    with torch.no_grad():
        np.testing.assert_allclose(tables.inv_freq, layer.frequencies([1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(tables.attn_scale, [(0.1 * np.log(t) + 1) ** 2 for t in (1, 2, 3)], rtol=1e-6)
    further = train(result.path, tmp_path / "further", **options)
    assert json.loads((further.path / "config.json").read_text())["rope_scaling"]["dynamics"] == "yarn"
    with pytest.raises(TrainError, match="has dynamics = yarn, which is not to change"):
        train(result.path, tmp_path / "no", dynamics="ntk", **options)
    sooner = read_tables(clex_convert.convert(result.path, tmp_path / "n.gguf", original_context=32).path)
    assert sooner.original_context_length == 32
    np.testing.assert_array_equal(sooner.inv_freq, tables.inv_freq)  # its YaRN counts turns in the 64 tokens as before
    frozen = {**options, "ode_learning_rate": 0.0}
    adapter = train(base, tmp_path / "adapter", dynamics="yarn", lora_rank=2, **frozen)
    made = read_tables(clex_convert.convert(base, tmp_path / "a.gguf", outtype="f32", lora=adapter.path).path)
    yarn = read_tables(clex_convert.convert(base, tmp_path / "y.gguf", outtype="f32", method="yarn", max_factor=3).path)
    np.testing.assert_allclose(made.inv_freq, yarn.inv_freq, rtol=5e-7)
    np.testing.assert_allclose(made.attn_scale, yarn.attn_scale, rtol=1e-6)


def test_layer_that_is_still_its_closed_form_moves_to_another_context(base, text, tmp_path):
    options = {**QUICK, "text": [text], "max_steps": 1, "ode_learning_rate": 0.0}
    near = train(base, tmp_path / "near", dynamics="yarn", lora_rank=2, **options)
    moved = train(base, tmp_path / "moved", lora=near.path, original_context=96, **{**options, "max_factor": 2})
    there = train(base, tmp_path / "there", dynamics="yarn", lora_rank=2, original_context=96, **options)
    assert json.loads((moved.path / "config.json").read_text())["max_position_embeddings"] == 96
    made, expected = (
        read_tables(clex_convert.convert(base, tmp_path / f"{one.path.name}.gguf", outtype="f32", lora=one.path).path)
        for one in (moved, there)
    )
    assert (made.original_context_length, list(made.scaling_factors)) == (96, [1, 2])
    np.testing.assert_allclose(made.inv_freq, expected.inv_freq[:2], rtol=1e-6)
    options |= {"ode_learning_rate": 1e-3, "max_steps": 4}
    learned = train(base, tmp_path / "learned", dynamics="yarn", lora_rank=2, **options)
    with pytest.raises(TrainError, match="was trained for an original context of 64 tokens"):
        train(base, tmp_path / "no", lora=learned.path, original_context=96, **options)


def gradients(base, text, folder, **options) -> dict[str, torch.Tensor]:
    """Of the first step of a LoRA training, in float64, and the types of what is frozen."""
    seen: dict[str, torch.Tensor] = {}

    def keep(model, *_):
        seen.update({name: one.grad.double() for name, one in model.named_parameters() if one.grad is not None})
        kinds = {one.dtype for one in model.parameters() if not one.requires_grad}
        assert kinds == {torch.bfloat16 if options.get("bf16") else torch.float32}

    with watched_steps(keep):
        train(base, folder, text=[text], lora_rank=4, max_steps=1, seed=1, **options)
    return {name: one for name, one in seen.items() if one.abs().max() > 0}


def test_gradients_in_bfloat16_are_as_near_as_those_of_plain_torch(done, base, text, tmp_path):
    """The yardstick is bfloat16's own error: of the same model without a layer, against float32."""
    errors = {}
    common = dict(length=64, batch_size=2, lora_target=("q_proj", "v_proj", "down_proj"))
    for name, folder, options in (
        ("plain", base, dict(no_clex=True, positions="none")),
        ("clex", done[0].path, dict(positions="uniform", time_dt=0.25)),
    ):
        exact, rounded = (
            gradients(folder, text, tmp_path / f"{name}{bf16}", bf16=bf16, **common, **options)
            for bf16 in (False, True)
        )
        assert exact.keys() == rounded.keys()
        errors[name] = {key: float((rounded[key] - exact[key]).norm() / exact[key].norm()) for key in exact}
    ode = [error for key, error in errors["clex"].items() if "clex_layer" in key]
    usual = max(errors["plain"].values())
    assert 2**-10 < usual < 0.1
    assert len(ode) == 2
    assert max(errors["clex"].values()) < 3 * usual


def test_merged_model_has_the_weights_of_its_folder(base, text, tmp_path):
    """Not those of bfloat16, in which they take part: with a learning rate of 0 they come out bit for bit."""
    options = dict(text=[text], lora_rank=2, merge=True, max_steps=1, bf16=True, length=24, time_dt=1.0)
    path = train(base, tmp_path / "out", learning_rate=0.0, **options).path
    before, after = (load_file(folder / "model.safetensors") for folder in (base, path))
    assert after.keys() == {*before, UP, DOWN}
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=0)
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"


def test_layer_is_trained_further_with_its_settings(done, text, tmp_path):
    options = dict(text=[text], length=24, max_steps=1, batch_size=2, learning_rate=0.0)
    result = train(done[0].path, tmp_path / "out", **options)
    before, after = (load_file(folder / "model.safetensors") for folder in (done[0].path, result.path))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (result.path / "config.json").read_bytes() == (done[0].path / "config.json").read_bytes()
    train(done[0].path, tmp_path / "longer", max_factor=8, log_scale=True, **options)
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert config["rope_scaling"]["max_factor"] == 8
    assert config["log_scale"] is True
    for changed in (dict(act="silu"), dict(param_factor=2), dict(original_context=128), dict(no_clex=True)):
        with pytest.raises(ClexError, match="the model"):
            train(done[0].path, tmp_path / "no", **changed, **options)


def test_control_without_a_layer(base, text, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0}
    options = dict(length=24, positions="chunked", max_steps=2, from_scratch=True, attention="eager", bf16=True)
    train(base, tmp_path / "out", text=[text], no_clex=True, rope_scaling=scaling, **options)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rope_scaling"].items() >= scaling.items()
    assert "rope_parameters" not in saved


def test_precision_is_no_matter_of_the_training_before(base, text, tmp_path):
    options = dict(text=[text], length=24, max_steps=1, no_clex=True)
    losses = [train(base, tmp_path / str(n), **options, bf16=bf16).loss for n, bf16 in enumerate((False, True, False))]
    assert losses[0] == losses[2] != losses[1]


def test_gaps_between_positions_are_no_borders_of_documents(base, text, tmp_path):
    """The loss at drawn positions is that of plain attention over all tokens before."""
    seen: dict[str, Any] = {}
    with watched_steps(lambda _, inputs, loss: seen.update(inputs, loss=loss)):
        train(base, tmp_path / "out", text=[text], no_clex=True, length=24, max_steps=1, seed=3, bf16=False)
    model = load_model(base)
    with torch.no_grad():
        rows, positions = seen["input_ids"], seen["position_ids"]
        assert (positions.diff() > 1).any()
        causal = torch.ones(24, 24).tril().bool()[None, None]
        expected = model(rows, attention_mask=causal, position_ids=positions, labels=rows).loss
    assert float(seen["loss"]) == pytest.approx(float(expected), rel=1e-4)


# interruption


@pytest.mark.parametrize(
    "options",
    [
        dict(factors_per_batch=2, gradient_accumulation=2),
        dict(lora_rank=2, gradient_checkpointing=True, bf16=True),
        dict(lora=Path("first")),
        dict(streaming=True),
    ],
    ids=["all weights", "LoRA", "LoRA further", "stream"],
)
def test_resumed_training_equals_an_uninterrupted_one(base, text, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    if "lora" in options:
        train(base, Path("first"), text=[text], **QUICK, lora_rank=2)
    arguments = dict(text=[text], **{**QUICK, "batch_size": 2}, **options)
    whole = train(base, tmp_path / "whole", **arguments)

    def interrupt(line: str) -> None:
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"saved a checkpoint at step [23]; `resume=True`"):
        train(base, tmp_path / "parts", **arguments, report=interrupt)
    assert not (tmp_path / "parts").exists()
    parts = train(base, tmp_path / "parts", **arguments, resume=True)
    assert (parts.steps, parts.loss) == (whole.steps, whole.loss)
    name = "adapter_model.safetensors" if (parts.path / "adapter_config.json").exists() else "model.safetensors"
    assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert sorted({*os.listdir(tmp_path)} - {"first"}) == ["parts", "whole"]


def test_all_options_belong_to_a_checkpoint_but_those_of_its_course():
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    same = TrainOptions(report=print, resume=True, save_steps=5, log_steps=5).identity(Path("m"), Path("o"))
    assert same == TrainOptions().identity(Path("m"), Path("o"))
    assert same.keys() - {"model", "output"} == names - {"report", "resume", "save_steps", "log_steps"}
    for change in (dict(text=[Path("a")]), dict(rope_scaling={"factor": 2}), dict(lora_target=["q"]), dict(bf16=False)):
        assert TrainOptions(**change).identity(Path("m"), Path("o")) != same
    # A command gives tuples where Python gives lists, and JSON knows lists alone.
    assert TrainOptions(text=[Path("a")]).identity(Path("m"), Path("o")) == json.loads(
        json.dumps(TrainOptions(text=(Path("a"),)).identity(Path("m"), Path("o")))
    )


def test_checkpoints_are_kept_for_the_same_arguments_only(base, text, tmp_path, monkeypatch):
    arguments = [base, tmp_path / "out", "--text", text, "--length", 24, "--time-dt", 1, "--max-steps", 3]
    step = ClexTrainer.training_step

    def fail(self, *rest):
        if self.state.global_step == 2:
            raise ClexError("stopped")
        return step(self, *rest)

    monkeypatch.setattr(ClexTrainer, "training_step", fail)
    assert run(*arguments, "--save-steps", 1) == (1, "clex-train: error: stopped\n")
    monkeypatch.undo()
    code, output = run(*arguments)
    assert code == 1
    assert "holds an unfinished training; pass --resume" in output
    code, output = run(*arguments, "--seed", 1, "--resume")
    assert "was begun with seed = 0, not 1" in output
    (tmp_path / "out.checkpoints" / "checkpoint-2" / "trainer_state.json").unlink()  # as if killed while it was saved
    code, output = run(*arguments, "--resume")
    assert code == 0, output
    assert output.endswith("s\n")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# LoRA


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Of the last of the tokens, in float32 and with a cache in float32."""
    llm = Llama(str(path), n_ctx=64, verbose=False, type_k=F32, type_v=F32, logits_all=True, **llama_arguments())
    llm.eval(tokens)
    found = llm.scores[len(tokens) - 1].copy()
    llm.close()
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_adapter_is_read_by_clex_convert_and_peft(base, text, tmp_path, bf16):
    """In the precision that it was trained with, but for the layer; that of bfloat16 is what was multiplied by."""
    options = {**QUICK, "seed": 2, "lora_rank": 2, "lora_alpha": 8.0, "lora_target": ("q_proj", "down_proj")}
    options |= {"text": [text], "bf16": bf16, "learning_rate": 3e-2}
    adapter = train(base, tmp_path / "adapter", **options).path
    merged = train(base, tmp_path / "merged", **options, merge=True).path
    assert not (adapter / "README.md").exists()
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in tensors) == 2 * SIZES["num_hidden_layers"]
    kind = torch.bfloat16 if bf16 else torch.float32
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name} == {kind}
    whole = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    for name in (UP, DOWN):
        torch.testing.assert_close(tensors[f"base_model.model.{name}"], whole[name], rtol=0, atol=0)
    assert whole[DOWN].abs().max() > 0
    files = [
        clex_convert.convert(folder, tmp_path / f"{name}.gguf", outtype="f32", lora=lora).path
        for name, folder, lora in (("a", base, adapter), ("m", merged, None), ("b", base, None))
    ]
    np.testing.assert_array_equal(*(read_tables(path).inv_freq for path in files[:2]))
    # Two factors are rounded by half of 2^-8 each.
    error = 2**-7 if bf16 else 1e-5
    model = peft.PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    name, before = "model.layers.0.self_attn.q_proj.weight", load_file(base / "model.safetensors")
    change = (whole[name] - before[name]).abs().max()
    torch.testing.assert_close(model.state_dict()[name], whole[name], rtol=1e-6, atol=float(error * change))
    tokens = [1 + n * n % 300 for n in range(40)]  # where the tables change nothing
    mine, exact, plain = (logits(path, tokens) for path in files)
    assert np.abs(mine - exact).max() < 2 * error * np.abs(exact - plain).max()


# several processes

PROCESSES = """
import multiprocessing, os, sys
import torch
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from clex_train.cli import main
from clex_train.layer import ClexSettings
from clex_train.model import add_clex, load_model
from clex_train.train import train
from clex_train.trainer import _average_gradient

base, text, out = map(Path, sys.argv[1:])

def data_parallel(rank):
    main([str(base), str(out), "--text", str(text), "--length", "24", "--max-steps", "2", "--time-dt", "1",
          "--max-factor", "2", "--ode-learning-rate", "1e-3", "--log-steps", "1", "--warmup-ratio", "0"])

def sharded(rank):
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = load_model(base)
    layer = add_clex(model, ClexSettings(max_factor=4, time_dt=1.0))
    torch.nn.init.normal_(layer.proj_func.ode_down_proj, std=0.01)
    for weight in layer.parameters():
        weight.register_post_accumulate_grad_hook(_average_gradient)
    options = dict(mesh=init_device_mesh("cpu", (2,)), ignored_params=set(layer.parameters()))
    for module in (*model.model.layers, model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), **options)
    rows = torch.arange(20)[None] + rank
    model(rows, labels=rows, attention_mask=torch.ones_like(rows), position_ids=torch.arange(20.0)[None] * 3,
          clex_factors=torch.tensor([3]), use_cache=False).loss.backward()
    weight = layer.proj_func.ode_down_proj
    os.write(1, f"{weight.dtype} {float(weight.grad.norm())}{chr(10)}".encode())

def begin(what, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    what(rank)

context, failed = multiprocessing.get_context("fork"), 0
for what in (data_parallel, sharded):
    with __import__("socket").socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [context.Process(target=begin, args=(what, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        failed |= process.exitcode
sys.exit(failed)
"""


def test_two_processes(base, text, tmp_path):
    """With the environment of torchrun, and with the parts that FSDP's plugin is given."""
    command = [sys.executable, "-c", PROCESSES, str(base), str(text), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["step 1/2", "step 2/2", str(tmp_path / "out")]
    assert load_file(tmp_path / "out" / "model.safetensors")[DOWN].abs().max() > 1e-4
    assert lines[3] == lines[4]
    assert lines[3].startswith("torch.float32 ")


# what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "there is nothing to train on; give --text, --dataset or --chat"),
        ("--text {missing}", "missing: no such file"),
        ("--text {binary}", "binary: is not UTF-8 text"),
        ("--text {short}", "shorter than one sequence of 64 tokens"),
        ("--text {short} --streaming --max-steps 1", "shorter than one sequence of 64 tokens"),
        ("--dataset {other}", "other: the dataset has no column 'text', only words"),
        ("--dataset {missing}", "missing: the dataset could not be loaded"),
        ("--text {text} --streaming", "a stream has no known end; give --max-steps"),
        ("--text {text} --merge", "--merge needs --lora-rank or --lora"),
        ("--text {text} --lora {missing}", "missing: no such folder"),
        ("--text {text} --lora {other}", "other: not the folder of a LoRA adapter"),
        ("--text {text} --lora {adapter}", "changes model.layers"),
        ("--text {text} --lora-rank 2 --lora-target nothing", "peft cannot add the adapter"),
        ("--text {text} --no-clex --ode-learning-rate 1", "which --no-clex leaves out"),
        ("--text {text} --rope-scaling {{}}", "pass --no-clex"),
        ("--text {text} --trainer-args {binary}", "binary: cannot be read"),
        ("--text {text} --trainer-args {unknown}", "unknown: transformers refuses the training arguments"),
        ("--text {text} --trainer-args {fsdp}", "fsdp.json: transformers refuses the training arguments (Using fsdp"),
        (
            "--text {text} --length 24 --max-steps 3 --time-dt 1 --learning-rate 1e30 --warmup-ratio 0",
            "the loss is nan",
        ),
        (
            "--text {text} --length 24 --max-steps 3 --time-dt 1 --act silu --ode-learning-rate 1e20 --warmup-ratio 0",
            "dynamics diverge",
        ),
    ],
)
def test_bad_input_gives_one_line(base, text, tmp_path, options, message):
    places = {name: tmp_path / name for name in ("missing", "binary", "short", "other", "unknown")}
    places["fsdp"] = Path(__file__).parent.parent / "examples" / "fsdp.json"
    places["adapter"] = tmp_path / "adapter"  # of another model
    shutil.copytree(Path(__file__).parent.parent / "examples" / "smollm2-long", places["adapter"])
    (places["adapter"] / "config.json").unlink()
    places["binary"].write_bytes(b"\xff\xfe\x00")
    places["short"].write_text("short")
    places["unknown"].write_text('{"no_such_argument": 1}')
    Dataset.from_dict({"words": ["a"]}).save_to_disk(places["other"])
    arguments = options.format(text=text, **places).split()
    code, output = run(base, tmp_path / "out", *arguments)
    assert code == 1
    lines = [line for line in output.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1, output
    assert lines[0].startswith("clex-train: error: ")
    assert message in lines[0]
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.parametrize(
    "arguments", [["--length", "1"], ["--positions", "all"], ["--rope-scaling", "[]"], ["--no-such-option"]]
)
def test_wrong_usage_is_one_line(base, tmp_path, arguments):
    code, output = run(base, tmp_path / "out", *arguments)
    assert code == 2
    assert output.count("\n") == 1
    assert output.startswith("clex-train: error: ")
    assert arguments[0] in output


def test_errors_of_the_library_name_its_arguments(base, text, tmp_path):
    for options, message in (
        (dict(), "give `text`, `dataset` or `chat`"),
        (dict(text=[text], merge=True), "`merge` needs `lora_rank` or `lora`"),
        (dict(text=[text], lora=base, lora_rank=2), "leave out `lora_rank`"),
        (dict(text=[text], length=10**6), "a smaller `length`"),
    ):
        with pytest.raises(TrainError) as error:
            train(base, tmp_path / "out", **options)
        assert message in str(error.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lenght'"):
        train(base, tmp_path / "out", text=[text], lenght=24)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_adapter_is_trained_further(base, text, tmp_path, bf16):
    """It begins where it was left, with its layer, rank and targets, and is one adapter of the base model again."""
    options = {**QUICK, "text": [text], "learning_rate": 3e-2, "bf16": bf16}
    new = dict(dynamics="yarn", lora_rank=2, lora_alpha=8.0, lora_target=("q_proj", "down_proj"))
    first = train(base, tmp_path / "first", **new, **options).path
    before = load_file(first / "adapter_model.safetensors")
    still = {**options, "learning_rate": 0.0, "ode_learning_rate": 0.0}
    same = train(base, tmp_path / "same", lora=first, **still).path
    torch.testing.assert_close(load_file(same / "adapter_model.safetensors"), before, rtol=0, atol=0)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, same)]
    assert configs[0]["rope_scaling"] == configs[1]["rope_scaling"]
    assert configs[0]["max_position_embeddings"] == configs[1]["max_position_embeddings"]

    steps = {**options, "max_steps": 3, "seed": 1}
    whole = train(base, tmp_path / "whole", lora=first, **steps).path
    after = load_file(whole / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    merged = load_file(train(base, tmp_path / "merged", lora=first, merge=True, **steps).path / "model.safetensors")
    for name in (UP, DOWN):
        torch.testing.assert_close(after[f"base_model.model.{name}"], merged[name], rtol=0, atol=0)
    adapted = peft.PeftModel.from_pretrained(load_model(base), whole).merge_and_unload().state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(adapted[name], merged[name], rtol=1e-6, atol=1e-3 if bf16 else 1e-6)


def test_models_that_cannot_be_trained(base, text, tmp_path, golden_dir):
    def error(model: Path, *more: Any) -> str:
        code, output = run(model, tmp_path / "out", "--text", text, "--max-steps", 1, *more)
        assert code == 1
        assert len(output.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return output

    assert "not a model folder, it has no config.json" in error(tmp_path)
    assert "cannot load the model" in error(broken(base, tmp_path / "a", "model.safetensors", b"\0" * 100))
    assert "no tokenizer" in error(broken(base, tmp_path / "b", "tokenizer.model", b""))
    make_model("Falcon", {}, tmp_path / "c", golden_dir("phi2"))
    assert "cannot be added to FalconForCausalLM; supported: Llama" in error(tmp_path / "c")
    make_model("Llama", {"vocab_size": 16}, tmp_path / "d", golden_dir("llama"))
    assert "the model has a vocabulary of 16 only" in error(tmp_path / "d")
    path = broken(golden_dir("llama"), tmp_path / "e")
    weights = load_file(path / "model.safetensors")
    save_file({name: part for name, part in weights.items() if name != UP}, path / "model.safetensors")
    assert "holds 0 tensors named ode_up_proj" in error(path)
    save_file({**weights, UP: torch.zeros(8, 16)}, path / "model.safetensors")
    assert "ode_up_proj must be [16, p * 32]" in error(path)
    (tmp_path / "out").mkdir()
    code, output = run(base, tmp_path / "out", "--text", text)
    assert (code, "already exists" in output) == (1, True)
    code, output = run(base, tmp_path / "no" / "out", "--text", text)
    assert (code, "the folder" in output) == (1, True)


def broken(model: Path, folder: Path, name: str | None = None, data: bytes = b"") -> Path:
    """A copy of a model folder with one file replaced."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(data if file.name == name else file.read_bytes())
    return folder


@pytest.mark.parametrize("more", [(), ("--save-steps", "1")])
def test_full_disk_leaves_nothing(base, text, tmp_path, more):
    """No file may be larger than 100 kB, the model is."""
    command = [base, tmp_path / "out", "--text", text, "--length", 24, "--max-steps", 1, "--time-dt", 1, *more]
    list(
        load_sequences([text], None, transformers.AutoTokenizer.from_pretrained(base), 24)
    )  # the cache is no part of it
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[0][1]))
        code, output = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert code == 1
    assert "the disk is full or a size limit was reached; make room first" in output.splitlines()[-1]
    assert os.listdir(tmp_path) == []
