"""Trainings whose model is divided among processes: what they save is whole, and what one process computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clex_convert
from clex_local.model_file.tables import read_tables
from helpers.tiny_models import make_model

pytestmark = [pytest.mark.train, pytest.mark.folders]

ROOT = Path(__file__).parent.parent
FSDP = ROOT / "examples" / "fsdp.json"
# Positions of up to 4 * 4096, of which bfloat16 knows one of 64.
COMMON = [
    *(
        "--length",
        "24",
        "--span",
        "4096",
        "--max-factor",
        "4",
        "--time-dt",
        "1",
        "--max-steps",
        "3",
        "--log-steps",
        "1",
    ),
    *("--learning-rate", "1e-3", "--ode-learning-rate", "1e-3", "--warmup-ratio", "0"),
]
LAST = "model.layers.1.mlp.down_proj"
LORA = ["--lora-rank", "2", "--bf16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, golden_dir) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    make_model("Llama", dict(hidden_size=64, intermediate_size=96), folder, golden_dir("llama"))
    return folder


def run(base: Path, folder: Path, trainings: dict[str, list[Any]], **environment: str) -> dict[str, list[str]]:
    """The lines of each training, by the name of its output; each in a group of two processes."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 97} make {(i + i * i) % 97}.\n" for i in range(400)), encoding="utf-8")
    listed = [
        [str(part) for part in (base, folder / name.split()[0], "--text", text, *COMMON, *more)]
        for name, more in trainings.items()
    ]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    own = {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.sharded_training", json.dumps(listed)],
        env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    blocks: list[list[str]] = [[]]
    for line in done.stdout.splitlines():
        if line.startswith("step 1/"):
            blocks.append([])
        blocks[-1].append(line)
    return dict(zip(trainings, blocks[1:], strict=False))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with what trainings saved, and what they said."""
    folder = tmp_path_factory.mktemp("trained")
    sharded = ["--trainer-args", FSDP]
    trainings: dict[str, list[Any]] = {
        "copies": ["--no-bf16"],
        "shards": ["--no-bf16", *sharded, "--interrupt", "1"],
        "shards resumed": ["--no-bf16", *sharded, "--resume"],
        "lora-copies": LORA,
        "lora-shards": [*LORA, *sharded],
        "lora-merged": [*LORA, *sharded, "--merge"],
    }
    return folder, run(base, folder, trainings)


def losses(lines: list[str]) -> list[float]:
    return [float(line.split("loss ")[1].split(",")[0]) for line in lines if line.startswith("step ")]


def test_fsdp_saves_what_copies_of_the_model_give(base, trained):
    """Though interrupted and continued from a checkpoint of it."""
    folder, _ = trained
    whole, sharded = (load_file(folder / name / "model.safetensors") for name in ("copies", "shards"))
    before = load_file(base / "model.safetensors")
    assert whole.keys() == sharded.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=2e-5)
        assert name not in before or (weight - before[name]).abs().max() > 1e-4
    configs = [json.loads((folder / name / "config.json").read_text("utf-8")) for name in ("copies", "shards")]
    assert configs[0] == configs[1]


def test_adapter_of_fsdp_is_whole_and_converts(base, trained, tmp_path):
    """In bfloat16, where positions and the layer stay in float32: the losses are those of copies."""
    folder, lines = trained
    assert losses(lines["lora-shards"]) == pytest.approx(losses(lines["lora-copies"]), rel=1e-3)
    copies, shards = (load_file(folder / name / "adapter_model.safetensors") for name in ("lora-copies", "lora-shards"))
    assert {name: (one.shape, one.dtype) for name, one in copies.items()} == {
        name: (one.shape, one.dtype) for name, one in shards.items()
    }
    ode = [name for name in shards if "clex_layer" in name]
    assert len(ode) == 2
    assert {shards[name].dtype for name in ode} == {torch.float32}
    merged = load_file(folder / "lora-merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert merged.keys() == {*before, *(name.removeprefix("base_model.model.") for name in ode)}
    left, right = (shards[f"base_model.model.{LAST}.lora_{part}.weight"].float() for part in "BA")
    change = merged[f"{LAST}.weight"] - before[f"{LAST}.weight"]
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(change, 2 * left @ right, rtol=0, atol=float(change.abs().max()) / 50)
    files = [
        clex_convert.convert(model, tmp_path / f"{number}.gguf", outtype="f32", lora=lora).path
        for number, (model, lora) in enumerate(((base, folder / "lora-shards"), (folder / "lora-merged", None)))
    ]
    np.testing.assert_allclose(*(read_tables(path).inv_freq for path in files), rtol=1e-6)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed, which is built where it is installed")
def test_zero_saves_what_copies_of_the_model_give(base, tmp_path):
    """DeepSpeed's third stage, in float32 with all weights, and in bfloat16 with an adapter that is merged.

    The first time it compiles its optimizer of offloaded weights, for minutes.
    """
    options = json.loads((ROOT / "examples" / "deepspeed_zero3.json").read_text("utf-8"))
    mixed, exact = tmp_path / "mixed.json", tmp_path / "exact.json"
    mixed.write_text(json.dumps(options), encoding="utf-8")
    del options["deepspeed"]["torch_autocast"]
    exact.write_text(json.dumps(options), encoding="utf-8")
    trainings = {
        "copies": ["--no-bf16"],
        "shards": ["--no-bf16", "--trainer-args", exact, "--interrupt", "1"],
        "shards resumed": ["--no-bf16", "--trainer-args", exact, "--resume"],
        "merged": ["--no-bf16", "--trainer-args", mixed, "--lora-rank", "2", "--merge"],
    }
    run(base, tmp_path, trainings, DS_ACCELERATOR="cpu")
    saved = ("copies", "shards", "merged")
    whole, sharded, merged = (load_file(tmp_path / name / "model.safetensors") for name in saved)
    before = load_file(base / "model.safetensors")
    assert whole.keys() == merged.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=2e-5)
        assert merged[name].shape == weight.shape
    assert (merged[f"{LAST}.weight"] - before[f"{LAST}.weight"]).abs().max() > 1e-4
    path = clex_convert.convert(tmp_path / "merged", tmp_path / "m.gguf", outtype="f32").path
    assert len(read_tables(path).inv_freq) == 4


def test_fsdp_is_refused_where_it_would_not_shard(base, tmp_path):
    """On CPUs, without our doing, accelerate would give every process a copy of the model and say nothing."""
    text = tmp_path / "text.txt"
    text.write_text("words " * 500, encoding="utf-8")
    command = [base, tmp_path / "out", "--text", text, *COMMON, "--trainer-args", FSDP]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "clex_train.cli", *map(str, command)],
        env={**os.environ, **place, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--trainer-args asks for fsdp, which accelerate passes by on this machine's CPUs" in done.stderr
    assert not (tmp_path / "out").exists()
