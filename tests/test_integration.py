"""Programs that know nothing of clex_local: they find its library, their prompts get the right table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_local import Llama
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, **env}, timeout=300)


IS_OURS = "print(hasattr(llama_cpp.llama_cpp._lib, 'llama_clex_n_buckets'))"


# finding the library


@pytest.mark.parametrize("options", [(), ("-I",), ("-X", "utf8=1")])
def test_whoever_imports_llama_cpp_finds_the_library(options):
    done = run(*options, "-c", f"import llama_cpp; {IS_OURS}; import llama_cpp._ggml")
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_chosen_library_wins(stock_library):
    done = run("-c", f"import llama_cpp; {IS_OURS}", LLAMA_CPP_LIB_PATH=str(stock_library))
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_programs_started_from_here_inherit_nothing(tmp_path):
    code = "import os; before = dict(os.environ); import clex_local; clex_local.Llama; print(os.environ == before)"
    assert run("-c", code).stdout == "True\n"


def test_the_files_that_do_it_are_uninstalled_with_the_package():
    names = {path.name for path in distribution("clex-local").files or ()}
    assert {"clex_local.pth", "_clex_local_startup.py"} <= names


@pytest.fixture
def bindings(tmp_path: Path) -> Path:
    """Folder with llama-cpp-python in it, as it is where nothing else is installed."""
    source = Path(find_spec("llama_cpp").origin).parent
    shutil.copytree(source, tmp_path / "site" / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def test_bindings_with_a_library_keep_it_until_clex_local_is_imported(bindings, stock_library):
    (bindings / "llama_cpp" / "lib").symlink_to(stock_library)
    assert run("-c", f"import llama_cpp; {IS_OURS}", PYTHONPATH=str(bindings)).stdout == "False\n"
    done = run("-c", f"import clex_local, llama_cpp; {IS_OURS}; clex_local.install()", PYTHONPATH=str(bindings))
    assert (done.stdout, done.stderr) == ("True\n", "")
    wrong = run("-m", "clex_local", "json.tool", "--help", PYTHONPATH=str(bindings))
    assert wrong.returncode == 0


NOT_INSTALLED = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name == "llama_cpp" and path is None else find(name, path, target)
)
"""


@pytest.mark.parametrize("first", ["", "import clex_local;"])
def test_bindings_that_are_not_installed_come_with_the_package(first):
    done = run("-c", f"{NOT_INSTALLED}\n{first}import llama_cpp; {IS_OURS}; print(llama_cpp.__file__)")
    ours, path = done.stdout.splitlines()
    assert (ours, done.stderr) == ("True", "")
    assert Path(path).parts[-4:] == ("clex_local", "_bindings", "llama_cpp", "__init__.py")
    assert (Path(path).parents[1] / "LICENSE.md").is_file()


def test_bindings_that_are_not_installed_take_a_chosen_library(stock_library):
    done = run("-c", f"{NOT_INSTALLED}\nimport llama_cpp; {IS_OURS}", LLAMA_CPP_LIB_PATH=str(stock_library))
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("first", ["", "import clex_local;"])
def test_bindings_of_another_release_do_not_get_our_library(bindings, first):
    """Their structs may have other fields."""
    package = bindings / "llama_cpp" / "__init__.py"
    package.write_text('__version__ = "0.2.0"\nraise SystemExit("executed")\n')
    done = run("-c", f"{first}import llama_cpp; {IS_OURS}; print(llama_cpp.__version__)", PYTHONPATH=str(bindings))
    assert (done.stdout.splitlines()[0], done.stderr) == ("True", "")
    assert "0.2.0" not in done.stdout


def test_a_broken_installation_breaks_no_other_program(bindings):
    startup = Path(__file__).parent.parent / "startup"
    for path in startup.iterdir():
        shutil.copy(path, bindings)
    code = """
import site, sys
site.addsitedir(sys.argv[1])
import json
print("up")
try:
    import llama_cpp
except Exception as error:
    print(error)
"""
    shutil.copy(find_spec("typing_extensions").origin, bindings)
    done = run("-I", "-S", "-c", code, bindings)
    assert done.stdout == "up\nShared library with base name 'llama' not found\n"
    assert done.stderr == "clex_local: ModuleNotFoundError: No module named 'clex_local'\n"


# the bindings' own class


@pytest.mark.parametrize("n_tokens", [65, 200])
def test_the_bindings_own_class_declares_the_length_of_a_prompt(tmp_path, n_tokens):
    path = str(make_model(tmp_path / "model.gguf"))
    tokens = np.random.default_rng(0).integers(1, 250, n_tokens).tolist()
    options = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "verbose": False}

    def logits(llm):
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()

    with closing(Llama(path, **options, flash_attn=False)) as ours, closing(llama_cpp.Llama(path, **options)) as plain:
        ours.eval(tokens)
        expected = logits(ours)
        plain.eval(tokens)
        np.testing.assert_allclose(logits(plain), expected, atol=1e-4)
        with closing(llama_cpp.Llama(path, **options)) as stock:
            type(stock).eval.__wrapped__(stock, tokens)  # what the bindings do on their own
            assert np.abs(logits(stock) - expected).max() > 0.05
        plain.reset()
        plain.eval(tokens[:40])  # a short prompt after a long one
        ours.reset()
        ours.eval(tokens[:40])
        np.testing.assert_allclose(logits(plain), logits(ours), atol=1e-4)


def test_a_file_without_tables_and_a_class_of_others_are_left_alone(tmp_path):
    code = """
import sys, llama_cpp

class Mine(llama_cpp.Llama):
    pass

import clex_local
before = llama_cpp.Llama
clex_local.install()
clex_local.install()
llm = Mine(sys.argv[1], n_ctx=64, verbose=False)
llm.eval([1, 2, 3])
print(type(llm) is Mine, isinstance(llm, clex_local.Llama))
print(*(cls is clex_local.Llama for cls in (llama_cpp.Llama, llama_cpp.llama.Llama)))
# also for whoever imported the class before
print(type(before(sys.argv[1], n_ctx=64, verbose=False)) is clex_local.Llama)
"""
    done = run("-c", code, make_model(tmp_path / "model.gguf", tables=False))
    assert done.stdout == "True False\nTrue True\nTrue\n", done.stderr


# frameworks, each with the bindings' class and with ours

FRAMEWORKS = {
    "langchain_community": """
from langchain_community.llms import LlamaCpp
def answer(path, prompt):
    llm = LlamaCpp(model_path=path, n_ctx=256, n_batch=32, temperature=0, max_tokens=6, verbose=False)
    return llm.invoke(prompt), llm.client
""",
    "llama_index.llms.llama_cpp": """
from llama_index.llms.llama_cpp import LlamaCPP
def answer(path, prompt):
    llm = LlamaCPP(model_path=path, temperature=0, max_new_tokens=6, context_window=256, verbose=False,
                   model_kwargs={"n_batch": 32})
    return llm.complete(prompt, formatted=True).text, llm._model
""",
    "haystack_integrations.components.generators.llama_cpp": """
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.generators.llama_cpp import LlamaCppChatGenerator
def answer(path, prompt):
    llm = LlamaCppChatGenerator(path, n_ctx=256, n_batch=32, model_kwargs={"verbose": False},
                                generation_kwargs={"temperature": 0, "max_tokens": 6})
    llm.warm_up()
    return llm.run([ChatMessage.from_user(prompt)])["replies"][0].text, llm._model
""",
    "llama_cpp.server.app": """
from fastapi.testclient import TestClient
from llama_cpp.server import app as server
from llama_cpp.server.settings import ModelSettings, ServerSettings
def answer(path, prompt):
    settings = ModelSettings(model=path, n_ctx=256, n_batch=32, verbose=False)
    client = TestClient(server.create_app(server_settings=ServerSettings(), model_settings=[settings]))
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
    reply = client.post("/v1/completions", json=body).json()
    return reply["choices"][0]["text"], server._llama_proxy._current_model
""",
}
COMPARE = """
import json, sys
path, prompt = sys.argv[1:]
found = [answer(path, prompt)]
import clex_local
clex_local.install()
found.append(answer(path, prompt))
from clex_local.library import llama_clex
print(json.dumps([[text, isinstance(model, clex_local.Llama), llama_clex.seq_bucket(model.ctx, 0),
                   llama_clex.get_stats(model.ctx).n_rerotations] for text, model in found]))
"""


def needs(*modules: str) -> None:
    """Skip, which the summary of the tests shows, where a framework of requirements-frameworks.txt is missing."""
    for module in modules:
        pytest.importorskip(module.partition(".")[0])
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_frameworks_give_a_long_prompt_one_table(tmp_path, module):
    """A prompt of 7 batches and its answer lie in the last of 4 buckets, whose table even the first batch gets."""
    needs(*(["fastapi", "httpx"] if "server" in module else [module]))
    path = make_model(tmp_path / "model.gguf")
    prompt = "".join(map(chr, np.random.default_rng(1).integers(97, 123, 200)))
    done = run("-W", "ignore", "-c", FRAMEWORKS[module] + COMPARE, path, prompt)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, ours = json.loads(done.stdout.splitlines()[-1])
    assert plain[1:] == [False, 3, 0]
    assert ours[1:] == [True, 3, 0]
    assert isinstance(plain[0], str)
    assert isinstance(ours[0], str)


def test_the_server_starts_without_and_with_our_class():
    needs("fastapi", "uvicorn")
    for program in (["-m"], ["-m", "clex_local"]):
        done = run("-W", "ignore", *program, "llama_cpp.server", "--help")
        assert done.returncode == 0, done.stderr
        assert "--n_ctx" in done.stdout


def test_llm_runs_with_its_plugin_for_gguf_files(tmp_path):
    needs("llm", "llm_gguf")
    path = make_model(tmp_path / "model.gguf")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "models.json").write_text(json.dumps({"random": {"path": str(path), "aliases": ["r"]}}))
    done = run("-m", "llm", "models", LLM_USER_PATH=str(tmp_path))
    assert "gguf/random (aliases: r)" in done.stdout, done.stderr
    code = """
import llm, sys, clex_local
import llm_gguf
clex_local.install()
model = llm.get_model("r").get_model()
print(type(model) is clex_local.Llama, model.n_ctx())
print(len(list(llm.get_model("r").prompt("Hello", stream=True))) > 0)
"""
    done = run("-c", code, LLM_USER_PATH=str(tmp_path))
    assert done.stdout == "True 256\nTrue\n", done.stderr
