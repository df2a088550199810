"""What an application can import from the package is what `dir`, `help` and completion in an editor show."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
import typing
from dataclasses import fields
from importlib.resources import files

import pytest

import clex_local

# isort: split
import llama_cpp

pytestmark = pytest.mark.runtime


def test_dir_shows_every_public_name_and_no_other():
    public = [name for name in dir(clex_local) if not name.startswith("__")]
    assert public == sorted(clex_local.__all__)
    assert all(hasattr(clex_local, name) for name in public)
    assert {"Llama", "open_model", "Session", "inspect", "install", "RunOptions"} <= set(public)


def test_every_error_that_is_raised_is_public():
    assert clex_local.Llama  # imports every module that raises one

    def kinds(error):
        return {error}.union(*map(kinds, error.__subclasses__()))

    raised = {kind.__name__ for kind in kinds(clex_local.ClexError) if kind.__module__.startswith("clex_local.")}
    assert raised <= set(clex_local.__all__)


def test_help_has_a_line_for_each():
    text = pydoc.plain(pydoc.render_doc(clex_local))
    for name in ("open_model", "Session", "StateError", "on_prefill", "ContextWarning"):
        assert name in text


def test_importing_the_package_loads_no_library():
    code = "import sys, clex_local; dir(clex_local); clex_local.RunOptions; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'Lama'"):
        clex_local.Lama  # noqa: B018


def test_open_model_shows_the_options_as_its_arguments():
    parameters = list(inspect.signature(clex_local.open_model).parameters.values())
    assert [parameter.name for parameter in parameters[1:]] == [field.name for field in fields(clex_local.RunOptions)]
    assert [parameter.default for parameter in parameters[1:]] == [
        field.default for field in fields(clex_local.RunOptions)
    ]
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_ctx'"):
        clex_local.open_model("model.gguf", n_ctx=512)  # pyright: ignore[reportCallIssue]


def test_llama_shows_the_arguments_of_the_bindings_and_ours():
    ours = inspect.signature(clex_local.Llama).parameters
    theirs = inspect.signature(llama_cpp.Llama).parameters
    assert set(theirs) - {"kwargs"} <= set(ours)
    assert {"prefix_reuse", "policy", "clamp", "prompt_lookup"} <= set(ours)
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values())


def test_methods_show_the_arguments_of_the_bindings():
    methods = [name for name in dir(clex_local.Llama) if not name.startswith("_") and hasattr(llama_cpp.Llama, name)]
    methods = [name for name in methods if inspect.isfunction(getattr(clex_local.Llama, name))]
    assert {"create_completion", "create_chat_completion", "generate", "sample", "embed"} <= set(methods)
    for name in methods:
        ours, theirs = (inspect.signature(getattr(of, name)) for of in (clex_local.Llama, llama_cpp.Llama))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_the_types_of_llamas_arguments_are_all_written_down():
    assert clex_local.Llama
    from clex_local.runtime.bindings_arguments import BindingsArguments

    theirs = set(inspect.signature(llama_cpp.Llama).parameters) - {"model_path", "kwargs"}
    assert set(BindingsArguments.__annotations__) == theirs


@pytest.mark.parametrize("package", ["clex_local", "clex_convert", "clex_eval", "clex_train"])
def test_type_checkers_are_told_of_our_types(package):
    assert files(package).joinpath("py.typed").is_file()


def test_types_of_run_options_can_be_resolved():
    assert set(typing.get_type_hints(clex_local.RunOptions)) == {field.name for field in fields(clex_local.RunOptions)}
