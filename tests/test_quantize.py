"""Quantization: every type, importance matrices, types of single tensors, and sizes told beforehand."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert import cli, file_types
from clex_convert.check import TEXT
from clex_convert.imatrix import compute_imatrix, read_imatrix
from clex_convert.llama_cpp_scripts import conversion_scripts
from clex_local import Llama
from clex_local.model_file.gguf_api import tensor_types
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.sizes import readable_size
from helpers.gguf_maker import MODEL, _string, _value, gguf_bytes
from helpers.low_level import Context, Model

pytestmark = pytest.mark.convert

DATA = Path(__file__).parent / "data"
NTK: dict[str, Any] = {"method": "ntk", "check": "none"}
# Those of which llama.cpp makes nothing without one, for a model whose rows its blocks divide.
NEED_AN_IMATRIX = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"}


def plain_folder(name: str, target: Path, **config: Any) -> Path:
    """A golden model without its CLEX layer and with some config keys changed."""
    shutil.copytree(DATA / name, target, ignore=shutil.ignore_patterns("golden.npz"))
    merged = {**json.loads((target / "config.json").read_text()), "rope_scaling": None, **config}
    (target / "config.json").write_text(json.dumps(merged))
    tensors = load_file(target / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "clex" not in name}, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in F32 whose rows every block size divides, unlike those of the golden models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "wide"
    plain_folder("llama", folder, hidden_size=256, num_hidden_layers=1, intermediate_size=256)
    torch.manual_seed(1)
    config = json.loads((folder / "config.json").read_text())
    tensors = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return clex_convert.convert(folder, folder.parent / "wide.gguf", outtype="f32", **NTK).path


@pytest.fixture(scope="module")
def wide_imatrix(wide: Path) -> Path:
    path = wide.with_name("imatrix.gguf")
    compute_imatrix(wide, TEXT, path, chunks=8)
    return path


def types_of(path: Path) -> dict[str, str]:
    names = {code: name for name, code in tensor_types().items()}
    with GGUFFile(path) as file:
        return {tensor.name: names[tensor.type] for tensor in file.tensors}


def refused(capfd: Any, *arguments: object) -> str:
    """The one line of error that the command ends with."""
    result = click.testing.CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert (result.stdout, capfd.readouterr()) == ("", ("", ""))
    (line,) = result.stderr.splitlines()
    return line.removeprefix("clex-convert: error: ")


# types and sizes


@pytest.fixture(scope="module")
def wide_sizes(wide: Path, wide_imatrix: Path) -> dict[str, int | None]:
    found = clex_convert.sizes(wide, method="ntk") + clex_convert.sizes(wide, method="ntk", imatrix=wide_imatrix)
    # The later ones know the keys that an importance matrix adds; types that quantize nothing take none.
    return {size.outtype: size.size for size in found}


@pytest.mark.parametrize("outtype", ["copy", *file_types.OUTTYPES])
def test_every_type_converts_loads_and_has_the_size_foretold(
    tmp_path: Path, wide: Path, wide_imatrix: Path, wide_sizes: dict[str, int | None], outtype: str
) -> None:
    imatrix = None if outtype in ("copy", *file_types.UNQUANTIZED) else wide_imatrix
    result = clex_convert.convert(wide, tmp_path / "out.gguf", outtype=outtype, imatrix=imatrix, **NTK)
    assert result.notes == []
    assert result.path.stat().st_size == result.size == wide_sizes[outtype]
    with GGUFFile(result.path) as file:
        assert file.get("general.file_type") == file_types.file_type("f32" if outtype == "copy" else outtype)
    model = Model(result.path)
    with Context(model, n_ctx=256) as context:
        assert np.isfinite(context.feed(range(10, 30), 0)).all()
    model.close()


def test_types_that_need_an_importance_matrix_say_so(capfd: Any, tmp_path: Path, wide: Path) -> None:
    sizes = {size.outtype: size for size in clex_convert.sizes(wide, method="ntk")}
    assert {name for name, size in sizes.items() if size.note == "needs an importance matrix"} == NEED_AN_IMATRIX
    line = refused(capfd, wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "iq1_s")
    assert "iq1_s needs an importance matrix: pass --imatrix-from TEXT" in line
    assert not list(tmp_path.iterdir())


def test_sizes_of_a_folder_are_exact_and_cost_no_disk(tmp_path: Path) -> None:
    sizes = {size.outtype: size.size for size in clex_convert.sizes(DATA / "llama")}
    assert list(sizes) == list(file_types.OUTTYPES)
    for outtype in ("bf16", "q4_k_m"):
        made = clex_convert.convert(DATA / "llama", tmp_path / f"{outtype}.gguf", outtype=outtype, check="none")
        assert made.size == sizes[outtype]
    told: list[int] = []
    clex_convert.convert(DATA / "llama", tmp_path / "q4_0.gguf", outtype="q4_0", check="none", expected=told.append)
    assert told == [sizes["q4_0"]] == [(tmp_path / "q4_0.gguf").stat().st_size]


def test_the_command_lists_sizes_and_writes_nothing(tmp_path: Path, wide: Path) -> None:
    arguments = [str(wide), str(tmp_path / "out.gguf"), "--method", "ntk", "--dry-run", "--outtype", "q8_0"]
    one = click.testing.CliRunner().invoke(cli.main, arguments)
    assert one.exit_code == 0, one.output
    assert not list(tmp_path.iterdir())
    rows = [line.split() for line in one.stdout.splitlines()[1:]]
    (size,) = clex_convert.sizes(wide, method="ntk", outtype="q8_0")
    assert rows == [["q8_0", str(size.size), *readable_size(size.size).split()]]
    missing = click.testing.CliRunner().invoke(cli.main, [str(wide)])
    assert missing.exit_code == 2
    assert "Missing argument 'OUT.gguf'" in missing.stderr


def test_a_disk_without_room_is_known_before_writing(capfd: Any, tmp_path: Path) -> None:
    rows = 2**34  # of 128 floats: 8.8 TB, as a hole
    source = tmp_path / "in.gguf"
    keys = b"".join(_string(key) + _value(value) for key, value in MODEL.items())
    tensor = _string("a.weight") + struct.pack("<IQQIQ", 2, 128, rows, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(MODEL)) + keys + tensor
    source.write_bytes(head + bytes(-len(head) % 32))
    try:
        with source.open("rb+") as file:
            file.truncate(source.stat().st_size + 512 * rows)
    except OSError:
        pytest.skip("the file system has no files of that size")
    line = refused(capfd, source, tmp_path / "out.gguf", "--method", "ntk")
    assert f"out.gguf: needs 8796.1 GB of disk while it is made, {tmp_path} has " in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_quantizing_again_is_said(tmp_path: Path, wide: Path) -> None:
    first = clex_convert.convert(wide, tmp_path / "q8.gguf", outtype="q8_0", **NTK)
    second = clex_convert.convert(first.path, tmp_path / "q4.gguf", outtype="q4_0", **NTK)
    assert second.notes == ["the source was quantized already: quantizing it again costs quality"]
    assert second.size < first.size


# importance matrices


class Inputs:
    """Sums of squares of the columns that the layers of a transformers model are given."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}

    def watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda module, arguments: self.add(name, arguments[0]))

    def add(self, name: str, given: torch.Tensor) -> None:
        rows = given.detach().double().reshape(-1, given.shape[-1]).numpy()
        self.sums[name] = self.sums.get(name, 0.0) + (rows**2).sum(axis=0)
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def watch_experts(self, layer: Any, name: str) -> None:
        if hasattr(layer, "block_sparse_moe"):  # before transformers 5
            for e, expert in enumerate(layer.block_sparse_moe.experts):
                self.watch(expert.w1, f"{name}.ffn_gate_exps.{e}")
                self.watch(expert.w2, f"{name}.ffn_down_exps.{e}")
            return

        def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            given, chosen = arguments[:2]
            for e in range(len(module.gate_up_proj)):
                rows = given[(chosen == e).any(dim=-1)]
                gate, up = (rows @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                self.add(f"{name}.ffn_gate_exps.{e}", rows)
                self.add(f"{name}.ffn_down_exps.{e}", module.act_fn(gate) * up)

        layer.mlp.experts.register_forward_pre_hook(hook)

    def mean(self, name: str) -> np.ndarray:
        return self.sums[name] / self.counts[name]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_importance_matrix_is_the_mean_square_of_the_inputs(tmp_path: Path, name: str) -> None:
    import transformers

    folder = plain_folder(name, tmp_path / name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    inputs = Inputs()
    for i, layer in enumerate(model.eval().model.layers):
        for theirs, ours in (("q_proj", "attn_q"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
            inputs.watch(getattr(layer.self_attn, theirs), f"blk.{i}.{ours}")
        if name == "llama":
            inputs.watch(layer.mlp.gate_proj, f"blk.{i}.ffn_gate")
            inputs.watch(layer.mlp.down_proj, f"blk.{i}.ffn_down")
        else:
            inputs.watch_experts(layer, f"blk.{i}")

    path = clex_convert.convert(folder, tmp_path / "f32.gguf", outtype="f32", **NTK).path
    found = compute_imatrix(path, TEXT, tmp_path / "imatrix.gguf", chunks=3)
    assert (found.chunks, found.dataset) == (3, TEXT.name)
    loaded = Llama(str(path), vocab_only=True, verbose=False)
    tokens = np.array(loaded.tokenize(TEXT.read_bytes(), add_bos=True))
    for chunk in range(3):
        part = tokens[64 * chunk : 64 * (chunk + 1)].copy()
        part[0] = loaded.token_bos()
        with torch.no_grad():
            model(torch.tensor(part[None]))

    experts = getattr(model.config, "num_local_experts", 0)
    checked = 0
    for key in inputs.sums:
        if key.rpartition(".")[2].isdigit():
            tensor, _, expert = key.rpartition(".")
            mean = found.weights[f"{tensor}.weight"].reshape(experts, -1)[int(expert)]
        else:
            mean = found.weights[f"{key}.weight"]
        np.testing.assert_allclose(mean, inputs.mean(key), rtol=1e-2)
        checked += 1
    assert checked == 2 * (5 if name == "llama" else 3 + 2 * experts)
    if experts:  # that a text chooses differently often, so a count for all of them would not do
        assert len({inputs.counts[f"blk.0.ffn_gate_exps.{e}"] for e in range(experts)}) > 1


def test_an_importance_matrix_steers_the_quantizer(tmp_path: Path, wide: Path, wide_imatrix: Path) -> None:
    """Columns that matter are kept more exactly, and those of the matrix's own tensor alone decide."""
    imatrix = read_imatrix(wide_imatrix)
    name, matters = "blk.0.ffn_up.weight", np.arange(256) % 2 == 0
    steered = {**imatrix.weights, name: np.where(matters, 1000.0, 1.0).astype(np.float32)}
    path = tmp_path / "steered.dat"
    write_legacy(path, steered, chunks=8, dataset="made up")
    errors = []
    with conversion_scripts() as (_, gguf):
        original = read_tensor(gguf, wide, name)
        for matrix in (wide_imatrix, path):
            out = tmp_path / f"{matrix.name}.out"
            clex_convert.convert(wide, out, outtype="q2_k", imatrix=matrix, **NTK)
            errors.append(((read_tensor(gguf, out, name) - original) ** 2).mean(axis=0))
    assert errors[1][matters].mean() < 0.8 * errors[0][matters].mean()
    assert errors[1][~matters].mean() > errors[0][~matters].mean()


def read_tensor(gguf: Any, path: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def write_legacy(path: Path, weights: dict[str, np.ndarray], chunks: int, dataset: str) -> None:
    """The older format of llama-imatrix: sums over calls."""
    data = struct.pack("<i", len(weights))
    for name, values in weights.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, values.size)
        data += (values * 4).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", chunks, len(dataset)) + dataset.encode())


def test_both_formats_give_the_same_file(tmp_path: Path, wide: Path, wide_imatrix: Path) -> None:
    imatrix = read_imatrix(wide_imatrix)
    write_legacy(tmp_path / "old.dat", imatrix.weights, imatrix.chunks, imatrix.dataset)
    new = clex_convert.convert(wide, tmp_path / "new.gguf", outtype="iq2_xs", imatrix=wide_imatrix, **NTK)
    old = clex_convert.convert(wide, tmp_path / "old.gguf", outtype="iq2_xs", imatrix=tmp_path / "old.dat", **NTK)
    assert new.path.read_bytes() == old.path.read_bytes()
    with GGUFFile(new.path) as file:
        assert file.get("quantize.imatrix.dataset") == TEXT.name
        assert file.get("quantize.imatrix.chunks_count") == 8
        assert file.get("quantize.imatrix.entries_count") == len(imatrix.weights) == 7


def test_one_is_computed_and_kept(tmp_path: Path, wide: Path, wide_imatrix: Path) -> None:
    kept = tmp_path / "kept.gguf"
    options: dict[str, Any] = {"outtype": "iq2_xxs", **NTK}
    phases: dict[str, float] = {}
    made = clex_convert.convert(
        wide,
        tmp_path / "out.gguf",
        imatrix_from=TEXT,
        imatrix_chunks=8,
        save_imatrix=kept,
        progress=lambda phase, part: phases.update({phase: part}),
        **options,
    )
    assert kept.read_bytes() == wide_imatrix.read_bytes()
    assert phases["importance matrix"] == 1
    known = clex_convert.convert(wide, tmp_path / "known.gguf", imatrix=kept, **options)
    assert made.path.read_bytes() == known.path.read_bytes()
    (size,) = clex_convert.sizes(wide, method="ntk", outtype="iq2_xxs", imatrix_from=TEXT)
    assert size == clex_convert.Size("iq2_xxs", made.size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.gguf", "known.gguf", "out.gguf"]


def test_experts_that_a_text_never_chose_count_alike(tmp_path: Path) -> None:
    sums = {"a.weight.in_sum2": np.array([[2, 4], [0, 0]], np.float32), "a.weight.counts": np.array([[2], [0]])}
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(gguf_bytes({"general.type": "imatrix"}, {name: value for name, value in sums.items()}))
    np.testing.assert_array_equal(read_imatrix(path).weights["a.weight"], [1, 2, 1, 1])


@pytest.mark.parametrize("cut", [0, 3, 20, 100, -40])
@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_damaged_importance_matrices(
    capfd: Any, tmp_path: Path, wide: Path, wide_imatrix: Path, kind: str, cut: int
) -> None:
    path = tmp_path / f"imatrix.{kind}"
    if kind == "gguf":
        path.write_bytes(wide_imatrix.read_bytes())
    else:
        write_legacy(path, read_imatrix(wide_imatrix).weights, 1, "")
    path.write_bytes(path.read_bytes()[:cut])
    line = refused(capfd, wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q4_0", "--imatrix", path)
    assert line.startswith(f"{path}: ")
    assert any(word in line for word in ("damaged", "truncated"))


def test_files_that_are_no_importance_matrix_of_this_model(
    capfd: Any, tmp_path: Path, wide: Path, wide_imatrix: Path, golden_gguf: Callable[[str], Path]
) -> None:
    arguments = [wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q4_0", "--imatrix"]
    assert "no such file" in refused(capfd, *arguments, tmp_path / "none")
    assert "not an importance matrix but a GGUF file of type 'model'" in refused(capfd, *arguments, wide)
    path = tmp_path / "imatrix.dat"
    weights = read_imatrix(wide_imatrix).weights
    name = "blk.0.ffn_up.weight"
    for changed, message in (
        ({**weights, name: weights[name][:-1]}, f"of another model: it has 255 weights for {name}"),
        ({**weights, "blk.1.ffn_up.weight": weights[name]}, "of another model: this one has no tensor blk.1.ffn_up"),
        ({"output.weight": weights[name]}, "of another model: it has nothing for layer 0"),
        ({**weights, name: weights[name] * np.float32("nan")}, f"{name} has weights that are no mean squares"),
    ):
        write_legacy(path, changed, 1, "")
        assert message in refused(capfd, *arguments, path)


def test_texts_of_no_use(capfd: Any, tmp_path: Path, wide: Path) -> None:
    arguments = [wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q4_0", "--imatrix-from"]
    text = tmp_path / "text"
    assert "cannot be read (No such file" in refused(capfd, *arguments, text)
    for data, message in ((b" \n", "is empty"), (b"\xff\xfe\x00", "not a text in UTF-8"), (b"Short.", "has 7 tokens")):
        text.write_bytes(data)
        assert message in refused(capfd, *arguments, text)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# types of single tensors


def test_overrides_give_tensors_the_types_they_name(tmp_path: Path, wide: Path) -> None:
    out = tmp_path / "out.gguf"
    arguments = ["--method", "ntk", "--outtype", "q4_k_m", "--output-tensor-type", "q6_K"]
    arguments += ["--tensor-type", "ffn_(up|gate)=Q8_0", "--tensor-type", "ffn=q5_k", "--keep-f16", r"attn_[kv]\."]
    arguments += ["--token-embedding-type", "q3_k"]
    result = click.testing.CliRunner().invoke(cli.main, [str(wide), str(out), *arguments])
    assert result.exit_code == 0, result.output
    assert types_of(out) == {
        "token_embd.weight": "q3_k",
        "output.weight": "q6_k",
        "output_norm.weight": "f32",
        "blk.0.attn_norm.weight": "f32",
        "blk.0.ffn_norm.weight": "f32",
        "blk.0.attn_q.weight": "q4_k",
        "blk.0.attn_k.weight": "f16",
        "blk.0.attn_v.weight": "f16",
        "blk.0.attn_output.weight": "q4_k",
        "blk.0.ffn_up.weight": "q8_0",
        "blk.0.ffn_gate.weight": "q8_0",
        "blk.0.ffn_down.weight": "q5_k",
    }


def test_pure_is_one_type_for_all_matrices(tmp_path: Path, wide: Path) -> None:
    path = clex_convert.convert(wide, tmp_path / "out.gguf", outtype="q4_k_m", pure=True, **NTK).path
    assert {kind for name, kind in types_of(path).items() if "norm" not in name} == {"q4_k"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-f16", "("], "'(' is not a regular expression"),
        (["--keep-f16", "attn_w"], "no tensor has a name that 'attn_w' matches"),
        (["--tensor-type", "q8_0"], "must be given as NAME=TYPE, not 'q8_0'"),
        (["--tensor-type", "ffn=q9"], "the tensor type 'q9' is unknown"),
        (["--tensor-type", "_norm=q8_0"], "'_norm' names only tensors that cannot become q8_0"),
        (["--outtype", "f16", "--pure"], "go with quantized types, not with f16"),
        (["--outtype", "copy", "--tensor-type", "ffn=q8_0"], "go with quantized types, not with copy"),
        (["--imatrix", "a", "--imatrix-from", "b"], "give --imatrix or --imatrix-from, not both"),
        (["--save-imatrix", "a"], "go with --imatrix-from"),
        (["--imatrix-chunks", "2"], "go with --imatrix-from"),
    ],
)
def test_options_that_do_not_fit(capfd: Any, tmp_path: Path, wide: Path, arguments: list[str], message: str) -> None:
    assert message in refused(capfd, wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q4_0", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_importance_matrix_replaces_no_input(capfd: Any, tmp_path: Path, wide: Path) -> None:
    text = shutil.copy(TEXT, tmp_path / "text")
    start = [wide, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q4_0", "--overwrite", "--imatrix-from", text]
    assert "is the source itself" in refused(capfd, *start, "--save-imatrix", wide)
    assert "is the text of the importance matrix" in refused(capfd, *start, "--save-imatrix", text)
    assert "cannot be the importance matrix too" in refused(capfd, *start, "--save-imatrix", tmp_path / "out.gguf")


def test_another_alignment_is_refused(capfd: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes({**MODEL, "general.alignment": np.uint32(64)}, alignment=64))
    line = refused(capfd, source, tmp_path / "out.gguf", "--method", "ntk", "--outtype", "q8_0")
    assert "aligned to 64 bytes" in line


# a real model


@pytest.fixture(scope="module")
def smollm_folder(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a Hugging Face folder in f16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm") / "SmolLM2"
    options = {"gguf_file": smollm.name}
    model = AutoModelForCausalLM.from_pretrained(smollm.parent, dtype=torch.float16, **options)
    # transformers 5 goes on to call the weights quantized, and would not save them.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm.parent, **options).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)  # a copy of the GGUF
    return folder


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q4_k_m"])
def test_a_real_folder_still_answers(tmp_path: Path, smollm_folder: Path, outtype: str) -> None:
    (size,) = clex_convert.sizes(smollm_folder, method="ntk", outtype=outtype, pre_tokenizer="smollm")
    result = clex_convert.convert(
        smollm_folder, tmp_path / "out.gguf", method="ntk", outtype=outtype, pre_tokenizer="smollm"
    )
    assert result.size == size.size
    llm = Llama(str(result.path), n_ctx=128, verbose=False)
    question = {"role": "user", "content": "What is the opposite of hot?"}
    answer: Any = llm.create_chat_completion([question], temperature=0, max_tokens=16)
    assert "cold" in answer["choices"][0]["message"]["content"]
    llm.close()
