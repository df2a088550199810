"""The options of a conversion, and what a source gives before it is converted."""

from __future__ import annotations

import inspect
from pathlib import Path

import click
import pytest

import clex_convert
from clex_convert import cli, ode
from clex_convert.model_tables import model_metadata, model_tables
from clex_convert.open_source import open_source
from clex_convert.output import Output

pytestmark = pytest.mark.convert
DATA = Path(__file__).parent / "data"
# Promised to users of the Python functions.
KEYWORDS = {
    *("outtype", "method", "clex_weights", "lora", "original_context", "factors", "max_factor", "rope_scaling", "act"),
    *("time_dt", "dynamics", "log_scale", "bake", "pre_tokenizer"),
    *("imatrix", "imatrix_from", "imatrix_chunks", "save_imatrix"),
    *("tensor_type", "keep_f16", "output_tensor_type", "token_embedding_type", "pure", "check", "overwrite", "verbose"),
}
CALLBACKS = {"progress", "expected"}


@pytest.mark.parametrize(
    ("function", "own"), [(clex_convert.convert, {"source", "output"}), (clex_convert.sizes, {"source"})]
)
def test_functions_take_every_option_and_explain_it(function, own):
    assert set(inspect.signature(function).parameters) == own | KEYWORDS | CALLBACKS
    assert all(f"    {name}: " in function.__doc__ for name in own | KEYWORDS | CALLBACKS)


def test_the_command_has_every_option():
    names = {param.name for param in cli.main.params}
    assert names == {"source", "output", "dry_run", "version"} | KEYWORDS
    assert all(param.help for param in cli.main.params if isinstance(param, click.Option))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": [1, 2], "max_factor": 2}, "`factors` and `max_factor` exclude each other"),
        ({"check": "some"}, "the check must be one of none, basic, full"),
        ({"time_dt": 2.0}, "time_dt must be above 0"),
        ({"dynamics": "pi"}, "dynamics must be one of ntk, yarn, not 'pi'"),
    ],
)
def test_options_that_no_conversion_can_use(options, message):
    with pytest.raises(clex_convert.ConvertError, match=message):
        clex_convert.ConvertOptions(**options)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "copy"])
def test_a_layout_is_the_file_before_its_tensors(golden_gguf, tmp_path, outtype):
    source = golden_gguf("llama") if outtype == "copy" else DATA / "llama"
    options = clex_convert.ConvertOptions(outtype=outtype, check="none")
    path, parts = tmp_path / "layout.gguf", []
    with (
        open_source(source, options) as model,
        model.layout(model_metadata(model_tables(model, options), model, options), outtype) as layout,
    ):
        layout.write_header(path)
        assert path.stat().st_size == layout.size
        assert path.read_bytes().startswith(layout.header)
        layout.write(path, parts.append)
    made = clex_convert.convert(source, tmp_path / "made.gguf", **vars(options))
    assert path.read_bytes() == made.path.read_bytes()
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_sizes_integrate_the_dynamics_once(monkeypatch):
    calls, integrate = [], ode.integrate
    monkeypatch.setattr(ode, "integrate", lambda *arguments: calls.append(1) or integrate(*arguments))
    assert len(clex_convert.sizes(DATA / "llama")) > 30
    assert calls == [1]


def test_errors_speak_of_the_output_and_not_of_its_temporary_files(tmp_path):
    def fail() -> None:
        with Output(tmp_path / "out.gguf", overwrite=False) as output:
            first, second = output.temporary(), output.temporary()
            output.discard(first)
            raise clex_convert.ConvertError(f"{second}: cannot be made of {first}")

    with pytest.raises(clex_convert.ConvertError) as caught:
        fail()
    assert str(caught.value) == f"{tmp_path}/out.gguf: cannot be made of {tmp_path}/out.gguf"
    assert not list(tmp_path.iterdir())
