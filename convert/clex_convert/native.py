"""llama.cpp's own quantizer and loader, in a child process.

A child can be stopped at once (the C functions do not look for Ctrl-C), and where llama.cpp aborts on a file it
cannot bear, the converter still ends with a readable message.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from clex_convert.errors import ConvertError, disk_full, one_line

# Every type that llama_model_quantize can make, in the words of its constants LLAMA_FTYPE_MOSTLY_*.
OUTTYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
    *("iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "q1_0", "q2_0", "mxfp4_moe"),
)

# Bytes that llama_model_quantize may use for the rows at work, beside the tensor that they come from; its default is
# eight times as much as a machine for small models has.
_QUANTIZE_BUFFER = 256 << 20

# Text that a vocabulary needs its tokens for single bytes for, or a token for what is unknown.
_PROBE = "\tNaïve 漢字 🙂\n".encode()


def file_type(outtype: str) -> int:
    """Number of a type in llama.cpp's ``enum llama_ftype``."""
    from llama_cpp import llama_cpp

    return getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if outtype == "f32" else f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")


def quantize(
    source: Path, target: Path, outtype: str, shown: Path, *, verbose: bool, progress: Callable[[float], None]
) -> list[str]:
    """Quantizes a GGUF file with ``llama_model_quantize``.

    Args:
        source: GGUF file of any type.
        target: file to write.
        outtype: one of `OUTTYPES`.
        shown: the output that messages speak of.
        verbose: show llama.cpp's log.
        progress: called with the part of the tensors done, 0 to 1.

    Returns:
        What the user should know of the result, a sentence each.

    Raises:
        ConvertError: llama.cpp refuses, or the disk is full.
    """
    notes: list[str] = []

    def line_read(line: str) -> None:
        if match := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            progress((int(match[1]) - 1) / int(match[2]))
        if match := re.search(r"(\d+ of \d+) tensor\(s\) required fallback", line):
            notes.append(f"{match[1]} tensors have rows that blocks of {outtype} do not divide; they use a larger type")

    reason = _run_child(["quantize", str(source), str(target), str(file_type(outtype))], line_read, verbose)
    if reason is None:
        return notes
    if "iostream error" in reason:
        raise disk_full(shown)
    if "imatrix" in reason or "importance matrix" in reason:
        raise ConvertError(
            f"{shown}: {outtype} needs an importance matrix, which clex-convert does not make; "
            "use q2_k or a larger type"
        )
    raise ConvertError(f"{shown}: llama.cpp could not make {outtype}: {reason}")


def check_loads(path: Path, shown: Path, *, verbose: bool) -> None:
    """Lets llama.cpp read a file's settings and vocabulary, without its tensors, and tokenize a few characters.

    Raises:
        ConvertError: it refuses them, such as a pre-tokenizer name it does not know.
    """
    reason = _run_child(["check", str(path)], lambda line: None, verbose)
    if reason is None:
        return
    hint = ""
    if "pre-tokenizer" in reason:
        hint = "; pass another --pre-tokenizer"
    elif "unordered_map" in reason:  # what it throws when a sentencepiece vocabulary has no tokens for bytes
        hint = "; if its tokenizer is a byte-level BPE, pass the name of its pre-tokenizer with --pre-tokenizer"
    raise ConvertError(f"{shown}: llama.cpp cannot load the result: {reason}{hint}")


def _run_child(arguments: list[str], line_read: Callable[[str], None], verbose: bool) -> str | None:
    """Runs this module; None if it succeeds, otherwise the reason that llama.cpp's log gives."""
    command = [sys.executable, "-m", "clex_convert.native", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GGML_NO_BACKTRACE": "1"}
    last: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if verbose:
                    sys.stderr.write(line)
                last.append(line.strip())
                line_read(line)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code == 0:
        return None
    return _reason(list(last), code)


# A refusal of the quantizer or the loader, an exception that nobody catches, a failed assertion.
_REASONS = (
    r"failed to quantize: (.*)",
    r"error loading model\b.*?: (.*)",
    r"cannot encode the text: (.*)",
    r"what\(\): *(.*)",
    r"(\S+: GGML_ASSERT.*)",
)


def _reason(lines: list[str], code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out; close other programs and try again"
    for pattern in _REASONS:
        for line in reversed(lines):
            if match := re.search(pattern, line):
                return one_line(match[1])
    said = next((line for line in reversed(lines) if line), "it said nothing")
    return one_line(f"{said} (exit code {code})")


def _end_with_parent() -> None:
    """Ends this process as soon as nobody can read what it says: its parent was killed."""
    if not hasattr(select, "poll"):
        return
    watch = select.poll()
    watch.register(1, 0)  # no more than that the other end of the pipe was closed

    def wait() -> None:
        watch.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """The child: ``quantize SOURCE TARGET FTYPE`` or ``check FILE``, llama.cpp's log on standard output."""
    import ctypes

    _end_with_parent()
    from llama_cpp import llama_cpp

    # Ctrl-C reaches the whole process group; the C code would keep Python's handler from running.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        try:
            os.write(1, text)
        except OSError:
            os._exit(1)  # the parent is gone, so is the need for the result

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    command, *arguments = sys.argv[1:]
    if command == "quantize":
        source, target, ftype = arguments
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = int(ftype)
        parameters.allow_requantize = True
        parameters.max_buf_size = _QUANTIZE_BUFFER
        sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.pointer(parameters)))
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(arguments[0]), model_parameters)
    if not model:
        sys.exit(1)
    tokens, vocabulary = (llama_cpp.llama_token * 256)(), llama_cpp.llama_model_get_vocab(model)
    assert vocabulary is not None
    count = llama_cpp.llama_tokenize(vocabulary, _PROBE, len(_PROBE), tokens, len(tokens), True, False)
    sys.exit(0 if count > 0 else "llama.cpp cannot tokenize with this vocabulary")


if __name__ == "__main__":
    main()
