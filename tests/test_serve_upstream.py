"""llama.cpp's own tests of its server, from the pinned source, against ours and a local model.

The router gets the models of the hub that its tests name from a file of presets, and drafts come from the same model,
so that nothing is downloaded. The adapter that lora downloads is one of ours too, with a model that says the words
which its tests expect at each scale. Whole files that are left out: embedding, rerank, infill, vision_api, tool_call
and template need certain models, or templates that they find in the repository by relative paths; slot_save mostly
images; ctx_shift and kv_keep_only_active the words of a model of theirs; sleep, mcp_servers and tools_builtin minutes,
or programs of the system; chat_completion and compat_oai_responses are what tests/test_serve.py asks with the same
clients.

Single tests are left out that need a download, that expect words, or prompts with fewer tokens than letters, one that
reads a page of the internet, and one that wants a full shared cache to end all conversations, where ours ends the
longest. Those that count on timings being numbers alone are run with a model without tables: with tables there is an
object.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clex_local.server.process import server_program
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import model_parts
from helpers.workers import free_port

pytestmark = pytest.mark.serve

ARCHIVES = Path(__file__).parent.parent / "build" / "archive"
# Each of these runs in one process of pytest, with a port of its own.
GROUPS = {
    "api": ["basic", "completion", "compat_anthropic", "compat_gcp", "ignore_eos", "security", "tokenize"],
    "router": ["router"],
    "drafts and streams": ["speculative", "stream", "metrics", "proxy"],
    "without tables": ["metrics"],
    "adapters": ["lora"],
}
# Tests that pass.
LEAST = {"api": 72, "router": 13, "drafts and streams": 14, "without tables": 9, "adapters": 3}
LEFT_OUT = {
    "basic": ["load_split_model", "no_ui"],
    "completion": [
        *("completion[", "completion_stream[", "completion_with_openai", "completion_stream_with_openai"),
        *("n_probs_post", "completion_prompt_cache", "completion_unified"),
    ],
    "compat_anthropic": ["anthropic_messages_streaming", "anthropic_thinking", "anthropic_vision"],
    "metrics": ["metrics_embedding_prompt_is_counted"],
    "proxy": ["mcp_proxy"],
    "router": ["router_dedup_cache_models", "router_remote_preset", "router_download_model", "router_delete_model"],
    "security": ["access_static_assets", "local_media_file"],
    "speculative": ["slot_ctx_not_exceeded", "with_ctx_shift", "multi_requests_parallel"],
}
NUMBERS_ALONE = ["metrics_timings_are_finite", "metrics_timings_on_prompt_progress"]  # of metrics
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Their presets name models of the hub; this gives them one of ours, and nothing to download.
LOCAL = """

import utils


def _local(make):
    def preset():
        server = make()
        if "LOCAL_CTX" in os.environ:
            server.n_ctx = int(os.environ["LOCAL_CTX"])
        if server.model_file or server.model_hf_repo:
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = os.environ["LOCAL_MODEL"]
        else:
            server.models_preset = os.environ["LOCAL_MODELS"]
        return server
    return staticmethod(preset)


for _name in [name for name in vars(ServerPreset) if not name.startswith("_")]:
    setattr(ServerPreset, _name, _local(getattr(ServerPreset, _name)))
ServerPreset.load_all = staticmethod(lambda: None)
utils.download_file = lambda *_: os.environ["LOCAL_DOWNLOAD"]
"""
HUB = ("tinygemma3-GGUF:Q8_0", "test-model-stories260K:F32", "test-model-stories260K-infill:F32")

# What the tests of adapters expect at the scales 0, 0.3, 0.7 and 1.
WORDS = (b"little day ", b"special ", b"far ", b"eye ")
# Logits of the words, and what an adapter adds to them: at each of the scales another one leads by 15.
WITHOUT_ADAPTER, OF_ADAPTER = (0, -15, -65, -150), (0, 100, 200, 300)


def write_models(folder: Path, group: str) -> tuple[Path, Path]:
    """The model that a group's tests get, and what they get as a download."""
    keys, tensors = model_parts(original=2048, n_buckets=2, tables=group != "without tables")
    keys |= {"tokenizer.chat_template": TEMPLATE, "llama.context_length": np.uint32(4096)}
    model, adapter = folder / "model.gguf", folder / "adapter.gguf"
    if group != "adapters":
        model.write_bytes(gguf_bytes(keys, tensors))
        return model, model
    keys["tokenizer.ggml.tokens"][-len(WORDS) - 1 : -1] = WORDS
    for name, tensor in tensors.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            tensor[:] = 0  # layers add nothing, so that logits are the same after any text
    tensors["token_embd.weight"][:] = 1
    rows, width = tensors["output.weight"].shape
    tensors["output.weight"][:] = -1
    tensors["output.weight"][rows - len(WORDS) - 1 : -1] = np.array(WITHOUT_ADAPTER)[:, None] / width
    model.write_bytes(gguf_bytes(keys, tensors))
    added = np.zeros((rows, 1), np.float32)
    added[rows - len(WORDS) - 1 : -1, 0] = OF_ADAPTER
    lora = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    low = np.full((1, width), 1 / width, np.float32)
    adapter.write_bytes(
        gguf_bytes(
            {**lora, "adapter.lora.alpha": np.float32(1)},
            {"output.weight.lora_a": low, "output.weight.lora_b": added},
        )
    )
    return model, adapter


@pytest.mark.parametrize("group", GROUPS)
def test_server_tests_of_llama_cpp(tmp_path, group):
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
    (tmp_path / "tmp").mkdir(exist_ok=True)  # their repository has it
    with (tmp_path / "conftest.py").open("a") as file:
        file.write(LOCAL)
    model, downloaded = write_models(tmp_path, group)
    presets = tmp_path / "models.ini"
    presets.write_text("".join(f"[ggml-org/{name}]\nmodel = {model}\n" for name in HUB))
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "LLAMA_SERVER_BIN_PATH": str(server_program()),
        "LOCAL_MODEL": str(model),
        "LOCAL_MODELS": str(presets),
        "LOCAL_DOWNLOAD": str(downloaded),
        "PORT": str(port),
    }
    files = [f"unit/test_{name}.py" for name in GROUPS[group]]
    left_out = [(file, test) for file in GROUPS[group] for test in LEFT_OUT.get(file, [])]
    if group == "without tables":
        environment["LOCAL_CTX"] = "1024"  # for a prompt whose letters are tokens
    else:
        left_out += [("metrics", test) for test in NUMBERS_ALONE]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    command += [f"--deselect=unit/test_{file}.py::test_{test}" for file, test in left_out]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(result.stdout.rpartition(" passed")[0].split()[-1]) >= LEAST[group]
