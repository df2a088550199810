"""What clex-convert refuses: one clear line, an exit code that is not 0, and no file left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert import cli
from helpers.gguf_maker import MODEL, gguf_bytes

pytestmark = pytest.mark.convert

DATA = Path(__file__).parent / "data"
UP, DOWN = "model.clex_layer.proj_func.ode_up_proj", "model.clex_layer.proj_func.ode_down_proj"
LLAMA = DATA / "llama"
NTK = ["--method", "ntk", "--check", "none"]  # of a header alone, which cannot be decoded with
COMMAND = [sys.executable, "-c", "from clex_convert.cli import main; main()"]


def refused(capfd: Any, *arguments: object, code: int = 1) -> str:
    """Runs the command; checks that it ends with one line of error and returns that line."""
    out = next(Path(str(argument)) for argument in arguments if str(argument).endswith("out.gguf"))
    before = out.read_bytes() if out.is_file() else None
    files = set(out.parent.iterdir()) if out.parent.is_dir() else set()
    result = click.testing.CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("clex-convert: error: ")
    assert capfd.readouterr() == ("", "")  # nothing from the libraries either
    assert (out.read_bytes() if out.is_file() else None) == before
    assert (set(out.parent.iterdir()) if out.parent.is_dir() else set()) == files
    return lines[0]


def gguf(path: Path, **keys: Any) -> Path:
    path.write_bytes(gguf_bytes({**MODEL, **{name.replace("__", "."): value for name, value in keys.items()}}))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return gguf(tmp_path / "in.gguf")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out.gguf"


def folder(tmp_path: Path, *, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A copy of the golden LLaMA with changed config keys (None removes one) and perhaps other tensors."""
    copy = tmp_path / "llama"
    shutil.copytree(LLAMA, copy, ignore=shutil.ignore_patterns("golden.npz"))
    merged = {**json.loads((copy / "config.json").read_text()), **config}
    (copy / "config.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    if tensors is not None:
        save_file(tensors, copy / "model.safetensors")
    return copy


def scaling(**changes: Any) -> dict[str, Any]:
    merged = {**json.loads((LLAMA / "config.json").read_text())["rope_scaling"], **changes}
    return {key: value for key, value in merged.items() if value is not None}


# sources


def test_a_source_that_is_missing(capfd: Any, tmp_path: Path, out: Path) -> None:
    assert "none: no such file or folder" in refused(capfd, tmp_path / "none", out)


def test_a_folder_without_a_config(capfd: Any, tmp_path: Path, out: Path) -> None:
    assert "not a model folder, it has no config.json" in refused(capfd, tmp_path, out)


def test_a_file_of_another_kind(capfd: Any, out: Path) -> None:
    assert "not a GGUF file" in refused(capfd, LLAMA / "config.json", out, "--method", "ntk")


@pytest.mark.parametrize("cut", [30, 150, -40])
def test_a_truncated_gguf(capfd: Any, source: Path, out: Path, cut: int) -> None:
    source.write_bytes(source.read_bytes()[:cut])
    assert re.search("damaged|truncated", refused(capfd, source, out, "--method", "ntk"))


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00\xff"])
def test_a_config_that_is_no_config(capfd: Any, tmp_path: Path, out: Path, text: str) -> None:
    path = folder(tmp_path)
    (path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: " in refused(capfd, path, out)


@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [None, "many", -5])
def test_a_config_without_a_needed_key(capfd: Any, tmp_path: Path, out: Path, key: str, value: Any) -> None:
    line = refused(capfd, folder(tmp_path, **{key: value}), out)
    assert f"config.json: the key {key} is missing or unusable" in line


@pytest.mark.parametrize("key", ["max_position_embeddings", "rope_theta", "head_dim", "num_key_value_heads"])
@pytest.mark.parametrize("value", ["many", -5, 0, True])
def test_a_config_with_an_unusable_value(capfd: Any, tmp_path: Path, out: Path, key: str, value: Any) -> None:
    line = refused(capfd, folder(tmp_path, **{key: value}), out)
    assert f"config.json: the key {key} is missing or unusable" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_factor": None}, "pass --max-factor"),
        ({"max_factor": 0}, "max_factor must be a whole number"),
        ({"max_factor": "4x"}, "max_factor must be a number"),
        ({"max_factor": 2.5}, "max_factor must be a number"),
        ({"time_dt": 0}, "time_dt must be above 0"),
        ({"time_dt": float("nan")}, "time_dt must be"),
        ({"time_dt": 1e-12}, "takes more than 1000000 steps"),
        ({"act": "gelu"}, "act must be one of silu, tanh, not 'gelu'"),
        ({"dynamics": "pi"}, "dynamics must be one of ntk, yarn, not 'pi'"),
        ({"type": "yarn"}, "rope_scaling: the key act is unknown for 'yarn' and may change the frequencies"),
    ],
)
def test_a_config_with_unusable_scaling(
    capfd: Any, tmp_path: Path, out: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(capfd, folder(tmp_path, rope_scaling=scaling(**changes)), out)


def test_an_unsupported_folder(capfd: Any, tmp_path: Path, out: Path) -> None:
    line = refused(capfd, folder(tmp_path, architectures=["BambaForCausalLM"]), out)
    assert "the architecture BambaForCausalLM is not supported; supported: LlamaForCausalLM, Mistral" in line


def test_a_folder_without_a_rotary_embedding(capfd: Any, tmp_path: Path, out: Path) -> None:
    assert "ALiBi" in refused(
        capfd, folder(tmp_path, architectures=["FalconForCausalLM"], model_type="falcon", alibi=True), out
    )


def test_an_unsupported_gguf(capfd: Any, tmp_path: Path, out: Path) -> None:
    path = gguf(tmp_path / "in.gguf", general__architecture="jamba")
    line = refused(capfd, path, out, "--method", "ntk")
    assert "the architecture 'jamba' is not supported; supported: llama" in line


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama__rope__scaling__type": "longrope"}, "names LongRoPE, but has no tensors with its factors"),
        ({"split__count": np.uint16(3)}, "one of 3 parts of a split model"),
        ({"general__type": "adapter"}, "of type 'adapter', not a model"),
        ({"llama__context_length": np.uint32(0)}, "context_length is missing or unusable"),
        ({"llama__context_length": "many"}, "context_length must be a number"),
        ({"llama__attention__head_count": "two"}, "rope.dimension_count is missing"),
        ({"llama__rope__dimension_count": np.uint32(7)}, "rotary dimension must be even"),
        ({"llama__rope__freq_base": np.float32("nan")}, "rope.freq_base must be a number"),
        ({"llama__rope__freq_base": np.float32(0)}, "RoPE base (rope_theta) must be above 1"),
    ],
)
def test_a_gguf_that_tables_cannot_be_added_to(
    capfd: Any, tmp_path: Path, out: Path, keys: dict[str, Any], message: str
) -> None:
    assert message in refused(capfd, gguf(tmp_path / "in.gguf", **keys), out, "--method", "ntk")


@pytest.mark.parametrize(
    "keys", [{"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": np.float32(1)}, {}]
)
def test_scaling_that_does_nothing_is_no_obstacle(tmp_path: Path, out: Path, keys: dict[str, Any]) -> None:
    source = gguf(tmp_path / "in.gguf", **keys)
    assert click.testing.CliRunner().invoke(cli.main, [*map(str, (source, out)), *NTK]).exit_code == 0


def test_frequency_factors_of_no_use_and_no_tensors(capfd: Any, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "in.gguf"
    path.write_bytes(gguf_bytes(MODEL, {"rope_freqs.weight": np.ones(5, np.float32)}))
    assert "rope_freqs.weight must hold 4 f32 values" in refused(capfd, path, out, "--method", "ntk")
    path.write_bytes(gguf_bytes(MODEL, {}))
    assert "without tensors, not a model" in refused(capfd, path, out, "--method", "ntk")


# weights


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        ((16, 33), (33, 16), "ode_up_proj must be [16, p * 32] for a rotary dimension of 32, not [16, 33]"),
        ((32, 64), (64, 32), "ode_up_proj must be [16, p * 32]"),
        ((16, 32, 1), (32, 16), "ode_up_proj must be"),
        ((16, 32), (16, 32), "ode_down_proj must be [32, 16], not [16, 32]"),
        ((16, 64), (32, 16), "ode_down_proj must be [64, 16], not [32, 16]"),
    ],
)
def test_ode_weights_of_the_wrong_shape(
    capfd: Any, tmp_path: Path, out: Path, up: tuple[int, ...], down: tuple[int, ...], message: str
) -> None:
    tensors = {**load_file(LLAMA / "model.safetensors"), UP: torch.zeros(up), DOWN: torch.zeros(down)}
    assert message in refused(capfd, folder(tmp_path, tensors=tensors), out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ode_weights_that_are_not_finite(capfd: Any, tmp_path: Path, out: Path, value: float) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    tensors[DOWN][3, 4] = value
    line = refused(capfd, folder(tmp_path, tensors=tensors), out)
    assert "ode_down_proj holds values that are not finite" in line


@pytest.mark.parametrize("size", [1e4, -1e4, 1e20])
def test_dynamics_that_diverge(capfd: Any, tmp_path: Path, out: Path, size: float) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    tensors[DOWN] *= size
    line = refused(capfd, folder(tmp_path, tensors=tensors), out)
    assert "the dynamics diverge, at t = 2 the frequencies are not finite and above 0" in line


def test_half_of_a_layer(capfd: Any, tmp_path: Path, out: Path) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    del tensors[UP]
    assert "0 tensors named ode_up_proj" in refused(capfd, folder(tmp_path, tensors=tensors), out)


def test_no_layer_at_all(capfd: Any, tmp_path: Path, source: Path, out: Path) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    del tensors[UP], tensors[DOWN]
    line = refused(capfd, folder(tmp_path, tensors=tensors), out)
    assert "its config names CLEX, but it has no CLEX layer; pass its weights with --clex-weights, or --method" in line
    assert "pass them with --clex-weights" in refused(capfd, source, out, "--method", "clex")


def test_a_weights_file_of_no_use(capfd: Any, tmp_path: Path, source: Path, out: Path) -> None:
    path = tmp_path / "weights.safetensors"
    assert "no such file" in refused(capfd, source, out, "--clex-weights", path)
    path.write_bytes(b"nonsense")
    assert "not a readable safetensors file" in refused(capfd, source, out, "--clex-weights", path)
    save_file({"ode_up_proj": torch.zeros(4, 8)}, path)
    assert "0 tensors named ode_down_proj" in refused(capfd, source, out, "--clex-weights", path)
    save_file({"other": torch.zeros(1)}, path)
    assert "has no CLEX layer" in refused(capfd, source, out, "--clex-weights", path)
    layer = {"ode_up_proj": torch.zeros(4, 8), "ode_down_proj": torch.zeros(8, 4)}
    save_file(layer, path)
    assert "pass --max-factor" in refused(capfd, source, out, "--clex-weights", path)
    save_file(layer, path, {"max_factor": "4", "act": "relu"})
    assert "act must be one of" in refused(capfd, source, out, "--clex-weights", path)
    assert "ntk has no weights" in refused(capfd, source, out, "--clex-weights", path, "--method", "ntk")


@pytest.mark.parametrize("kept", [4, 500, 100_000])
def test_truncated_safetensors(capfd: Any, tmp_path: Path, out: Path, kept: int) -> None:
    path = folder(tmp_path)
    with (path / "model.safetensors").open("rb+") as file:
        file.truncate(kept)
    assert "model.safetensors: damaged or truncated" in refused(capfd, path, out)


def test_truncated_and_hostile_bin(capfd: Any, tmp_path: Path, out: Path) -> None:
    path = folder(tmp_path)
    (path / "model.safetensors").unlink()
    assert "holds no weights" in refused(capfd, path, out)
    weights = path / "pytorch_model.bin"
    torch.save(load_file(LLAMA / "model.safetensors"), weights)
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "pytorch_model.bin: damaged, truncated or not plain weights" in refused(capfd, path, out)
    torch.save({"weight": print}, weights)  # a pickle that names a function, which weights do not need
    assert "not plain weights" in refused(capfd, path, out)


def test_a_missing_shard(capfd: Any, tmp_path: Path, out: Path) -> None:
    path = folder(tmp_path)
    index = path / "model.safetensors.index.json"
    names = load_file(LLAMA / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    index.write_text(
        json.dumps({"weight_map": {**dict.fromkeys(names, "model-1.safetensors"), "x": "model-2.safetensors"}})
    )
    assert "places x in model-2.safetensors, which is missing" in refused(capfd, path, out)
    index.write_text("{}")
    assert "index.json: cannot be read" in refused(capfd, path, out)


@pytest.mark.parametrize("kept", ["tokenizer.model", None])
def test_a_tokenizer_that_llama_cpp_cannot_read(capfd: Any, tmp_path: Path, out: Path, kept: str | None) -> None:
    path = folder(tmp_path)
    (path / "tokenizer.model").unlink()
    if kept is None:
        assert f"{path}: holds no tokenizer (tokenizer.json or tokenizer.model)" in refused(capfd, path, out)
    else:
        (path / kept).write_bytes(b"nonsense")
        line = refused(capfd, path, out, "--outtype", "f32")
        assert f"{path}: llama.cpp's conversion of LlamaForCausalLM cannot read the tokenizer (" in line


def test_a_tokenizer_of_another_model(capfd: Any, tmp_path: Path, out: Path) -> None:
    """An assertion of llama.cpp's scripts, whose text is empty."""
    path = folder(tmp_path)
    (path / "tokenizer.model").unlink()
    shutil.copy(DATA / "phi2" / "tokenizer.json", path)
    config = json.loads((path / "tokenizer.json").read_text())
    config["model"]["vocab"]["surplus"] = 600
    (path / "tokenizer.json").write_text(json.dumps(config))
    line = refused(capfd, path, out, "--pre-tokenizer", "gpt-2")
    assert "cannot read the tokenizer (AssertionError: base.py, line" in line
    assert "those of another model" in line


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(name: str, dtype: torch.dtype, capfd: Any, tmp_path: Path, out: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(LLAMA / "model.safetensors").items()}
    tensors[name].view(-1)[-1] = float("nan")
    path = folder(tmp_path, tensors=tensors)
    for outtype in ("f32", "q8_0"):
        line = refused(capfd, path, out, "--outtype", outtype)
        assert f"{path / 'model.safetensors'}: {name} holds values that are not finite (NaN or infinite)" in line


def test_weights_beyond_f16(capfd: Any, tmp_path: Path, out: Path) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    line = refused(capfd, folder(tmp_path, tensors=tensors), out, "--outtype", "f16")
    assert "too large for f16; use --outtype bf16" in line


# outputs and options


def test_an_output_that_exists(capfd: Any, source: Path, out: Path) -> None:
    out.write_text("precious")
    assert "already exists; pass --overwrite" in refused(capfd, source, out, "--method", "ntk")
    # Also when the conversion fails after all.
    assert "pass them with --clex-weights" in refused(capfd, source, out, "--method", "clex", "--overwrite")


def test_outputs_that_cannot_be(capfd: Any, tmp_path: Path, source: Path, out: Path) -> None:
    assert "the folder" in refused(capfd, source, out.parent / "none" / "out.gguf", "--method", "ntk")
    assert "does not exist" in refused(capfd, source, source / "out.gguf", "--method", "ntk")
    out.mkdir()
    assert "is a folder" in refused(capfd, source, out, "--method", "ntk", "--overwrite")
    out.rmdir()
    os.mkfifo(out)
    assert "not a regular file" in refused(capfd, source, out, "--method", "ntk", "--overwrite")


def test_an_output_that_is_an_input(capfd: Any, tmp_path: Path, out: Path) -> None:
    source = gguf(out)
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    assert "is the source itself" in refused(capfd, source, out, "--method", "ntk", "--overwrite")
    assert "is the source itself" in refused(capfd, link, out, "--method", "ntk", "--overwrite")
    path = folder(tmp_path)
    result = click.testing.CliRunner().invoke(cli.main, [str(path), str(path / "model.safetensors"), "--overwrite"])
    assert result.exit_code == 1
    assert "belongs to the source" in result.stderr
    assert (path / "model.safetensors").read_bytes() == (LLAMA / "model.safetensors").read_bytes()


def test_options_that_do_not_fit(capfd: Any, source: Path, out: Path) -> None:
    line = refused(capfd, source, out, "--method", "ntk", "--original-context", 65)
    assert "must be from 1 to the model's own 64 tokens, not 65" in line
    assert "max_factor must be" in refused(capfd, source, out, "--method", "ntk", "--max-factor", 10**6)
    assert "for model folders" in refused(capfd, source, out, "--method", "ntk", "--pre-tokenizer", "gpt-2")
    assert "choose a type for a model folder" in refused(capfd, LLAMA, out, "--outtype", "copy")


def test_quantizing_what_llama_cpp_cannot_load(capfd: Any, source: Path, out: Path) -> None:
    line = refused(capfd, source, out, "--method", "ntk", "--outtype", "q8_0")
    assert "llama.cpp could not make q8_0: " in line


def test_usage_errors_have_their_own_code(source: Path, out: Path) -> None:
    for arguments in (["--outtype", "q9"], ["--max-factor", "0"], ["--act", "gelu"], ["--method", "pi"]):
        assert click.testing.CliRunner().invoke(cli.main, [str(source), str(out), *arguments]).exit_code == 2


# what happens around the process


def run(*arguments: object, code: str | None = None, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = COMMAND if code is None else [sys.executable, "-c", f"{code}\n{COMMAND[2]}"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, preexec_fn=limit, check=False
    )


def check_one_line(done: subprocess.CompletedProcess[str], out: Path, message: str) -> None:
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("which", "arguments", "size"),
    [
        ("folder", ["--outtype", "f32"], 400_000),  # in llama.cpp's scripts, between tensors
        ("gguf", ["--method", "ntk"], 200_000),  # in the copy
        ("gguf", ["--method", "ntk", "--outtype", "f32"], 1_200_000),  # in llama.cpp's quantizer
    ],
)
def test_a_full_disk(
    tmp_path: Path, golden_gguf: Callable[[str], Path], out: Path, which: str, arguments: list[str], size: int
) -> None:
    source = LLAMA
    if which == "gguf":
        source = tmp_path / "in.gguf"
        clex_convert.convert(golden_gguf("llama"), source, method="ntk", outtype="f16")
    done = run(source, out, *arguments, file_size=size)
    check_one_line(done, out, f"{out}: could not be written: the disk is full or a size limit was reached")


def test_missing_packages_are_named(tmp_path: Path, source: Path, out: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file({"ode_up_proj": torch.zeros(4, 8), "ode_down_proj": torch.ones(8, 4)}, weights)
    missing = (
        "import sys\nfor name in ('torch', 'torchdiffeq', 'transformers', 'safetensors'): sys.modules[name] = None"
    )
    for arguments in ([LLAMA], [source, "--clex-weights", weights, "--max-factor", 2]):
        done = run(arguments[0], out, *arguments[1:], code=missing)
        check_one_line(done, out, "needs the Python package torch: pip install 'clex-local[convert]'")
    done = run(LLAMA, out, "--outtype", "f32", code="import sys; sys.modules['transformers'] = None")
    check_one_line(done, out, "needs the Python package transformers: pip install 'clex-local[convert]'")
    # Tables in closed form do without them.
    assert run(source, out, *NTK, code=missing).returncode == 0


def stop(arguments: list[object], out: Path, number: int, ready: Callable[[list[Path]], bool]) -> tuple[int, str]:
    """Starts the command and sends a signal as soon as its temporary files satisfy `ready`."""
    child = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not ready(list(out.parent.iterdir())):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    return child.returncode, errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["reading", "quantizing"])
def test_stopping_leaves_nothing(out: Path, smollm: Path, number: int, code: int, phase: str) -> None:
    if phase == "reading":
        arguments, ready = [LLAMA, out], lambda files: len(files) == 1
    else:
        arguments = [smollm, out, "--method", "ntk", "--outtype", "q2_k"]
        ready = lambda files: len(files) == 2 and min(path.stat().st_size for path in files) > 0  # noqa: E731
    returned, errors = stop(arguments, out, number, ready)
    assert returned == code, errors
    wanted = ["clex-convert: error: interrupted; nothing was written"] if number == signal.SIGINT else []
    assert errors.splitlines() == wanted
    assert list(out.parent.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path) -> None:
    from clex_convert import ConvertError, convert
    from clex_convert.output import Output

    before = Output.commit

    def commit(self: Output, path: Path) -> None:
        out.write_text("precious")
        before(self, path)

    monkeypatch.setattr(Output, "commit", commit)
    with pytest.raises(ConvertError, match="already exists"):
        convert(source, out, method="ntk", check="none")
    assert [path.read_text() for path in out.parent.iterdir()] == ["precious"]
