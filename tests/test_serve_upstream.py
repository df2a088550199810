"""llama.cpp's own tests of its server, from the pinned source, against ours and a local model.

Left out are those that need a download (embedding and ranking models, LoRA, images, the router's models, infill), what
expects words of a model of theirs, files that the tests find in the repository by relative paths (templates, images),
those that wait for minutes (speculative decoding, sleep), and one that wants a full shared cache to end all
conversations, where ours ends the longest.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clex_local.server import server_program
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import model_parts

pytestmark = pytest.mark.serve

ARCHIVES = Path(__file__).parent.parent / "build" / "archive"
FILES = ["basic", "completion", "compat_anthropic", "ignore_eos", "security", "tokenize"]
LEFT_OUT = {
    "basic": ["load_split_model", "no_ui"],
    "completion": [
        *("completion[", "completion_stream[", "completion_with_openai", "completion_stream_with_openai"),
        *("n_probs_post", "completion_prompt_cache", "completion_unified"),
    ],
    "compat_anthropic": ["anthropic_messages_streaming", "anthropic_thinking", "anthropic_vision"],
    "security": ["access_static_assets", "local_media_file"],
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Their presets name models of the hub; this gives them one of ours, and nothing to download.
LOCAL = """

def _local(make):
    def preset():
        server = make()
        server.model_hf_repo = server.model_hf_file = None
        server.model_file = os.environ["LOCAL_MODEL"]
        return server
    return staticmethod(preset)


for _name in [name for name in vars(ServerPreset) if not name.startswith("_")]:
    setattr(ServerPreset, _name, _local(getattr(ServerPreset, _name)))
ServerPreset.load_all = staticmethod(lambda: None)
"""


def test_server_tests_of_llama_cpp(tmp_path):
    for name in ("requests", "filelock"):
        pytest.importorskip(name)
    archive = next(ARCHIVES.glob("*/*.tar.gz"), None)
    if archive is None:
        pytest.skip("the source distribution is not there: run `make native`")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, name = member.name.partition("/vendor/llama.cpp/tools/server/tests/")
            if found and member.isfile():
                member.name = name
                tar.extract(member, tmp_path, filter="data")
    (tmp_path / "wget.py").touch()  # imported, for downloads alone
    with (tmp_path / "conftest.py").open("a") as file:
        file.write(LOCAL)
    keys, tensors = model_parts(original=2048, n_buckets=2)
    keys |= {"tokenizer.chat_template": TEMPLATE, "llama.context_length": np.uint32(4096)}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(keys, tensors))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "LLAMA_SERVER_BIN_PATH": str(server_program()),
        "LOCAL_MODEL": str(tmp_path / "model.gguf"),
        "PORT": str(port),
    }
    files = [f"unit/test_{name}.py" for name in FILES]
    left_out = [f"--deselect=unit/test_{file}.py::test_{test}" for file, tests in LEFT_OUT.items() for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *left_out, *files]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(result.stdout.rpartition(" passed")[0].split()[-1]) > 70
