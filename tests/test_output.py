"""What becomes of the output, whatever happens to the process: the same complete file each time, or none."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from clex_convert import ConvertError, convert
from clex_convert.file_types import file_type
from helpers.gguf_maker import MODEL, gguf_bytes

pytestmark = pytest.mark.convert

LLAMA = Path(__file__).parent / "data" / "llama"
COMMAND = [sys.executable, "-c", "from clex_convert.cli import main; main()"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out.gguf"


# the same bytes each time, and their SHA-256


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, out: Path) -> None:
    result = convert(LLAMA, out, outtype="q4_0")
    assert result.sha256 == sha256(out)
    # Elsewhere, later, with other hashes of strings and another number of threads.
    folder = tmp_path / "elsewhere" / "llama"
    shutil.copytree(LLAMA, folder)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    again = tmp_path / "again.gguf"
    threads = str(torch.get_num_threads() + 1)
    done = subprocess.run(
        [*COMMAND, "llama", again, "--outtype", "q4_0"],
        cwd=folder.parent,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": threads, "TZ": "Pacific/Apia"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1 - len(result.notes)] == f"SHA-256 {result.sha256}"
    assert sha256(again) == result.sha256


@pytest.mark.parametrize(("threads", "buffer"), [(1, 0), (3, 1 << 14)])
def test_neither_threads_nor_buffers_change_quantized_weights(
    tmp_path: Path, golden_gguf: Callable[[str], Path], threads: int, buffer: int
) -> None:
    from llama_cpp import llama_cpp

    source, again = tmp_path / "f32.gguf", tmp_path / "again.gguf"
    convert(golden_gguf("llama"), source, method="ntk")
    result = convert(source, tmp_path / "out.gguf", method="ntk", outtype="q4_0")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type("q4_0"), threads
    if buffer:
        parameters.max_buf_size = buffer
    assert not llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(again), ctypes.pointer(parameters))
    assert sha256(again) == result.sha256


# stopped by force


def started(*arguments: object) -> psutil.Popen:
    return psutil.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def sizes(folder: Path) -> list[int]:
    found = []
    for entry in list(os.scandir(folder)):
        with contextlib.suppress(FileNotFoundError):
            found.append(entry.stat().st_size)
    return found


MOMENTS: dict[str, Callable[[list[int], int], bool]] = {
    "begun": lambda files, source: bool(files),
    "copying": lambda files, source: sum(files) > source // 3,
    "copied": lambda files, source: sum(files) > source,
    "quantizing": lambda files, source: sum(files) > source + 10_000_000,
    "quantized in part": lambda files, source: sum(files) > source + 100_000_000,
    "reading back": lambda files, source: len(files) == 1 and files[0] > source + 10_000_000,
}


def test_a_kill_at_any_moment_leaves_no_file_and_the_next_run_no_litter(
    tmp_path: Path, out: Path, smollm: Path
) -> None:
    whole = convert(smollm, tmp_path / "whole.gguf", method="ntk", outtype="q8_0").sha256
    source, killed = smollm.stat().st_size, 0
    for reached in MOMENTS.values():
        process = started(smollm, out, "--method", "ntk", "--outtype", "q8_0", "--overwrite")
        wait_for(lambda: reached(sizes(out.parent), source) or process.poll() is not None)  # noqa: B023
        children = process.children()
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert psutil.wait_procs(children, timeout=10)[1] == []  # not at the end of a tensor, but at once
        if out.exists():  # the last kill may come too late, but the file is complete then
            assert sha256(out) == whole
            out.unlink()
    assert killed >= len(MOMENTS) - 1
    assert sizes(out.parent)
    assert convert(smollm, out, method="ntk", outtype="q8_0").sha256 == whole
    assert list(out.parent.iterdir()) == [out]


def test_a_child_that_the_system_kills_is_an_error(out: Path, smollm: Path) -> None:
    process = started(smollm, out, "--method", "ntk", "--outtype", "q2_k")
    wait_for(lambda: len(list(out.parent.iterdir())) == 2 and sum(sizes(out.parent)) > smollm.stat().st_size + 10**6)
    (child,) = process.children()
    child.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith(f"clex-convert: error: {out}: llama.cpp could not make q2_k: its process was killed")
    assert list(out.parent.iterdir()) == []


def test_temporary_files_of_other_runs_stay_while_these_live(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    from clex_convert.output import Output

    with Output(out, overwrite=False) as other:
        theirs = other.temporary()
        of_another_target = theirs.with_name(theirs.name.replace("out", "other"))
        left = theirs.with_name(re.sub("[0-9a-f]{16}", "0123456789abcdef", theirs.name))
        for path in (of_another_target, left):
            path.touch()
        convert(source, out, method="ntk", check="none")
        assert set(out.parent.iterdir()) == {out, theirs, of_another_target}
    assert set(out.parent.iterdir()) == {out, of_another_target}


# the disk


@pytest.mark.parametrize(("which", "outtype"), [("folder", "f32"), ("gguf", None), ("gguf", "f32")])
def test_a_disk_with_one_byte_too_few(
    tmp_path: Path, golden_gguf: Callable[[str], Path], out: Path, which: str, outtype: str | None
) -> None:
    source = LLAMA
    if which == "gguf":
        source = tmp_path / "in.gguf"
        convert(golden_gguf("llama"), source, method="ntk", outtype="f16")
    options = ["--method", "ntk", "--max-factor", "4"] + (["--outtype", outtype] if outtype else [])
    size = convert(source, out, method="ntk", max_factor=4, outtype=outtype).size
    out.unlink()
    done = subprocess.run(
        [*COMMAND, source, out, *options],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"clex-convert: error: {out}: could not be written: the disk is full or a size limit was reached; "
        "make room first\n"
    )
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_file_is_on_the_disk_before_it_has_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: Path, overwrite: bool
) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    if overwrite:
        out.write_text("old")
    done: list[str] = []

    def watch(name: str, describe: Callable[..., str]) -> None:
        function = getattr(os, name)

        def call(*arguments: object) -> None:
            function(*arguments)
            done.append(describe(*arguments))

        monkeypatch.setattr(os, name, call)

    watch("fsync", lambda descriptor: f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
    watch("link", lambda *paths: "name")
    watch("replace", lambda *paths: "name")
    convert(source, out, method="ntk", overwrite=overwrite, check="none")
    assert done == ["sync .tmp", "name", "sync "]


def test_a_folder_that_cannot_be_written(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    with pytest.raises(ConvertError, match=r"/proc/self/out.gguf: could not be written \("):
        convert(source, "/proc/self/out.gguf", method="ntk")


# memory

# Two of these are by far the largest tensors: as bf16 they have 201 MB each, as float32 twice as much. The others have
# less in all, but as float32 more than one of those.
VOCABULARY, WIDTH, LAYERS = 49152, 2048, 6
LARGEST = 2 * VOCABULARY * WIDTH


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "large"
    folder.mkdir()
    config = json.loads((LLAMA / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(LLAMA / "tokenizer.model", folder)
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (128, WIDTH), "mlp.up_proj": (128, WIDTH), "mlp.down_proj": (WIDTH, 128)}
    layer |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    shapes |= {"model.norm": (WIDTH,), "model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH)}
    random = np.random.default_rng(0)
    tensors = {  # random signs and mantissas, exponents around 2^-6
        f"{name}.weight": torch.from_numpy(random.integers(0, 2**16, shape, np.uint16) & 0x80FF | 0x3C00).view(
            torch.bfloat16
        )
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def measured(code: str, *arguments: object) -> list[int]:
    """What a process prints: whole numbers."""
    head = """
import resource, sys
from pathlib import Path
from clex_convert import convert

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
"""
    done = subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


GROWTH = """
small, source, target = sys.argv[1:]
convert(small, target, outtype="bf16")
before = peak()
convert(source, target, outtype="bf16", method="ntk", overwrite=True)
print(peak() - before)
"""


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_folder_needs_less_memory_than_its_largest_tensor(tmp_path: Path, large: Path, layout: str) -> None:
    folder = large
    if layout == "bin":
        folder = tmp_path / "large"
        shutil.copytree(large, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(large / "model.safetensors"), folder / "pytorch_model.bin")
    (growth,) = measured(GROWTH, LLAMA, folder, tmp_path / "out.gguf")
    assert growth < LARGEST


PEAKS = """
source, target, outtype = sys.argv[1:]
convert(source, target, outtype=outtype, method="ntk", overwrite=True)
print(peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def test_a_gguf_file_needs_no_more_memory_than_its_largest_tensor(tmp_path: Path, large: Path) -> None:
    source = tmp_path / "bf16.gguf"
    convert(large, source, outtype="bf16", method="ntk")
    parent, _ = measured(PEAKS, source, tmp_path / "out.gguf", "copy")
    assert parent < LARGEST
    # llama.cpp's quantizer maps one tensor after the other; its own buffers are kept to a quarter of a GiB.
    parent, child = measured(PEAKS, source, tmp_path / "out.gguf", "q8_0")
    assert parent < LARGEST
    assert child < LARGEST + 2**28 + 2**27
