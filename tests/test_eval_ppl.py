"""clex-eval: models of both kinds, and perplexity by context length."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from clex_eval import ppl
from clex_eval.cli import main
from clex_eval.loading import coverage, open_for_evaluation
from clex_eval.models import likelihoods
from clex_eval.options import LENGTHS, Length, names
from clex_eval.report import Column, Report, plot_curves, plot_heat_map, run
from clex_local import ClexError, Llama
from clex_local.figure import curve_style
from clex_local.session.session import PromptTooLong
from helpers.device import GPU_LAYERS
from helpers.low_level import F32
from helpers.tiny_models import LENGTH, convert_plainly, make_model

pytestmark = [pytest.mark.evaluation, pytest.mark.folders]

DATA = Path(__file__).parent / "data"
EXACT = dict(kv_type="f32", threads=1, n_gpu_layers=GPU_LAYERS)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A text of some thousand tokens."""
    rng = np.random.default_rng(0)
    syllables = ["the", "of", "no", "rel", "ing", "war", "sun", "tor", "low", "med", ". ", ", "]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(rng.choice([*syllables, " "], 6000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random LLaMA model without tables as a folder, its GGUF file in it."""
    path = tmp_path_factory.mktemp("plain")
    make_model("Llama", {"bos_token_id": 1, "eos_token_id": 2}, path, DATA / "llama")
    convert_plainly(path)
    return path


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["ppl", *map(str, arguments), "--kv-type", "f32", "--threads", "1"])


def found(*arguments: object) -> dict:
    result = evaluate(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def refused(*arguments: object, code: int = 1) -> str:
    result = evaluate(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("clex-eval: error: ")
    return result.stderr


def letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isprintable())


# perplexity


@pytest.mark.parametrize("stride", [None, 24])
def test_both_kinds_of_models_give_what_transformers_logits_say(folder, words, stride):
    options = ["--text", words, "--lengths", "32,1x,96", "--tokens", 384]
    options += [] if stride is None else ["--stride", stride]
    rows = found(folder, folder / "plain.gguf", *options)["rows"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bos, *tokens = tokenizer(words.read_text(encoding="utf-8")).input_ids
    assert bos == tokenizer.bos_token_id
    expected = []
    for n in (32, LENGTH, 96):
        step = min(stride or n, n)
        start = 96 - min(stride or 96, 96)
        values = []
        for end in range(start + step, start + 384 + 1, step):
            window = tokens[end - n : end]
            with torch.no_grad():
                logits = model(torch.tensor([[bos, *window[:-1]]])).logits[0]
            values += torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="none")[-step:]
        expected.append(float(np.exp(np.mean(values))))
    assert [row["perplexity"] for row in rows] == pytest.approx(expected * 2, rel=1e-5)
    assert [row["length"] for row in rows] == [32, LENGTH, 96] * 2
    assert {row["scaling_factor"] for row in rows} == {None}
    assert all(abs(row["difference"]) < 1e-5 for row in rows[3:])
    assert max(expected) > 1.01 * min(expected)


def test_a_window_has_one_table_and_gives_the_likelihoods_of_the_authors_code(golden_gguf, golden_npz):
    golden = golden_npz("llama")
    ids = golden["ids"].astype(np.int32)
    with open_for_evaluation(golden_gguf("llama"), batch=32, **EXACT) as model:
        for n in (40, 64, 65, 128, 129, 200):
            expected = likelihoods(golden[f"full_{n}"], ids[n - 3 : n + 1])
            np.testing.assert_allclose(model.negative_log_likelihoods(ids[: n + 1], last=4), expected, atol=5e-4)


@pytest.mark.parametrize("name", ["llama", "llama-log-scale"])
def test_a_growing_window_gets_the_tables_of_its_chunks(golden_gguf, golden_npz, name):
    ids = golden_npz(name)["ids"].astype(np.int32)
    llm = Llama(str(golden_gguf(name)), n_ctx=256, type_k=F32, type_v=F32, logits_all=True, verbose=False, n_threads=1)
    count = len(ids) - 1
    for a in range(0, count, 100):
        llm.eval(ids[a : min(a + 100, count)].tolist())
    with open_for_evaluation(golden_gguf(name), **EXACT) as model:
        grown = model.negative_log_likelihoods(ids, prefill="growing", chunk=100)
        whole = model.negative_log_likelihoods(ids)
    np.testing.assert_allclose(grown, likelihoods(llm.scores[:count], ids[1:]), atol=1e-5)
    assert np.abs(grown - whole).max() > 0.1
    llm.close()


@pytest.mark.parametrize("name", ["llama", "llama-log-scale"])
@pytest.mark.parametrize("prefill", ["one-shot", "growing"])
def test_a_trained_layer_gives_the_same_in_transformers_and_in_the_runtime(golden_gguf, words, name, prefill):
    options = ["--text", words, "--tokens", 512, "--prefill", prefill]
    rows = found(DATA / name, golden_gguf(name), *options)["rows"]
    assert [row["scaling_factor"] for row in rows] == [1, 2, 4] * 2
    for ours, theirs in zip(rows[3:], rows[:3], strict=True):
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=2e-5)


def test_fixed_policy_takes_the_last_table_for_every_length(golden_gguf, words):
    options = [golden_gguf("llama"), "--text", words, "--tokens", 256, "--lengths", "1x,4x"]
    fixed = found(*options, "--policy", "fixed")["rows"]
    chosen = found(*options)["rows"]
    assert [row["scaling_factor"] for row in fixed] == [4, 4]
    assert fixed[1]["nll"] == pytest.approx(chosen[1]["nll"], abs=1e-6)
    assert abs(fixed[0]["nll"] - chosen[0]["nll"]) > 1e-3
    options[-1] = "1x"  # whatever the size of the context
    alone = found(*options, "--policy", "fixed")["rows"]
    assert alone[0]["nll"] == pytest.approx(fixed[0]["nll"], abs=1e-6)


def test_lengths_without_a_table(golden_gguf, folder, words):
    path = golden_gguf("llama")
    line = refused(path, "--text", words, "--lengths", "1x,8x")
    assert "its tables cover 256 tokens, not 512" in line
    assert "--clamp" in line
    clamped = found(path, "--text", words, "--lengths", "4x,8x", "--tokens", 512, "--clamp")
    assert [row["scaling_factor"] for row in clamped["rows"]] == [4, 4]
    default = found(path, "--text", words, "--tokens", 256)
    assert [row["length"] for row in default["rows"]] == [64, 128, 256]
    assert "longer contexts are left out" in default["notes"][0]
    assert len(found(path, path, "--text", words, "--tokens", 256)["notes"]) == 1
    plain = found(folder / "plain.gguf", "--text", words, "--tokens", 256, "--lengths", "1x,4x")
    assert [row["length"] for row in plain["rows"]] == [64, 256]
    assert "has no tables" in plain["notes"][0]


def test_every_length_and_model_scores_the_same_tokens(golden_gguf, folder, words):
    models = [golden_gguf("llama"), folder / "plain.gguf", folder]
    report = found(*models, "--text", words, "--tokens", 500)
    assert [row["length"] for row in report["rows"]] == [64, 128, 256, *[64, 128, 256, 512] * 2]
    assert {row["tokens"] for row in report["rows"]} == {512}
    assert report["settings"]["lengths"] == ["1x", "2x", "4x", "8x"]
    for row in report["rows"]:
        assert row["windows"] * row["length"] == 512
        assert np.mean(row["block_nll"]) == pytest.approx(row["nll"], abs=1e-5)
        assert (row["block_tokens"], len(row["block_nll"])) == (64, 8)
        assert row["nll_error"] == pytest.approx(np.std(row["block_nll"], ddof=1) / np.sqrt(8), abs=1e-5)
        assert row["perplexity"] == pytest.approx(np.exp(row["nll"]))
    first = {row["length"]: row for row in report["rows"][:3]}
    for row in report["rows"][3:]:
        if row["length"] in first:
            change = np.array(row["block_nll"]) - first[row["length"]]["block_nll"]
            assert row["difference"] == pytest.approx(change.mean(), abs=1e-5)
            assert row["difference_error"] == pytest.approx(np.std(change, ddof=1) / np.sqrt(8), abs=1e-5)


def test_the_last_tokens_of_each_window_are_compared_with_the_same_in_the_shortest(golden_gguf, words):
    short, long = found(
        golden_gguf("llama"), "--text", words, "--tokens", 512, "--lengths", "1x,4x", "--by", 64
    )["rows"]  # fmt: skip
    last = np.array(long["block_nll"])[[3, 7]]
    assert long["last_nll"] == pytest.approx(last.mean(), abs=1e-5)
    assert long["last_change"] == pytest.approx((last - np.array(short["block_nll"])[[3, 7]]).mean(), abs=1e-5)
    assert short["last_change"] is None
    assert [(part["first"], part["end"]) for part in long["positions"]] == [(a, a + 64) for a in (0, 64, 128, 192)]
    assert long["positions"][3]["nll"] == long["last_nll"]


def test_tables_for_people(golden_gguf, words):
    result = evaluate(golden_gguf("llama"), "--text", words, "--lengths", "1x,2x", "--tokens", 128, "--by", 64)
    head, first, second = result.stdout.splitlines()
    assert head.split()[:4] == ["model", "context", "t", "windows"]
    assert head.split()[-4:] == ["from", "0", "from", "64"]
    assert (first.split()[:4], second.split()[:4]) == (["llama", "64", "1", "2"], ["llama", "128", "2", "1"])


def test_mean_and_its_error():
    values = np.array([1.0, 3, 5, 7, 2])
    assert ppl.mean_and_error(values, 2) == (3.6, pytest.approx(2.0))  # blocks of 2 and 6; the fifth is none
    assert ppl.mean_and_error(values, 3) == (3.6, None)


def test_likelihoods_of_extreme_logits():
    logits = np.array([[1e4, 0, -1e4], [-1e30, 0, 0]], np.float32)
    np.testing.assert_allclose(likelihoods(logits, np.array([1, 2], np.int32)), [1e4, np.log(2)])


# models


def test_both_kinds_of_models_speak_alike(folder):
    with (
        open_for_evaluation(folder, ctx=128) as theirs,
        open_for_evaluation(folder / "plain.gguf", ctx=128, **EXACT) as ours,
    ):
        assert (ours.original_context_length, ours.context_length, ours.bos) == (LENGTH, 128, (1,))
        assert (theirs.original_context_length, theirs.context_length, theirs.bos) == (LENGTH, 128, (1,))
        text = "sun and low, of the </s> tor"
        tokens = ours.tokenize(text, bos=True)
        assert tokens == theirs.tokenize(text, bos=True)
        # Of what is behind a special token the releases of transformers make different tokens.
        end = text[: text.index(">") + 1]
        assert ours.tokenize(end, special=True) == theirs.tokenize(end, special=True) != ours.tokenize(end)
        assert ours.detokenize(tokens[1:]).strip() == theirs.detokenize(tokens[1:]).strip() == text
        assert ours.chat("the sun", "low") == theirs.chat("the sun", "low")
        answer = ours.generate(tokens, 12)
        # they write bytes that are no characters differently
        assert letters(answer) == letters(theirs.generate(tokens, 12)) != ""
        stop = letters(answer)[2]
        before = ours.generate(tokens, 12, [stop])
        assert before == answer[: answer.index(stop)]
        assert letters(before) == letters(theirs.generate(tokens, 12, [stop]))
        with pytest.raises(PromptTooLong):
            ours.generate(tokens, 128)
        with pytest.raises(ClexError, match="do not fit"):
            theirs.generate(tokens, 128)


def test_an_answer_does_not_depend_on_what_was_asked_before(golden_gguf):
    with open_for_evaluation(golden_gguf("llama"), **EXACT) as model:
        prompt = model.tokenize("the sun of the low " * 20, bos=True)[:200]
        fresh = model.generate(prompt, 20)
        model.negative_log_likelihoods(np.array(prompt[::-1], np.int32))
        assert model.generate(prompt, 20) == fresh
        model.generate(prompt[::-1], 1)
        model.generate(prompt[:50], 1)  # with the first table
        assert model.generate(prompt, 20) == fresh


def test_coverage(golden_gguf, folder):
    for path, original, maximum in [(golden_gguf("llama"), 64, 256), (DATA / "llama", 64, 256), (folder, 64, None)]:
        covers = coverage(path)
        assert (covers.original, covers.maximum) == (original, maximum)


# the command


def test_bad_input_is_one_line(golden_gguf, folder, words, tmp_path):
    path = golden_gguf("llama")
    short = tmp_path / "short.txt"
    short.write_text("the sun", encoding="utf-8")
    assert "short.txt: has" in refused(path, "--text", short)
    assert "100,096 are needed" in refused(path, "--text", words, "--lengths", "1x", "--tokens", 100_050)
    assert "No such file" in refused(path, "--text", tmp_path / "none.txt")
    assert "not a UTF-8 text file" in refused(path, "--text", path)
    assert ".png or .svg" in refused(path, "--text", words, "--plot", "a.jpg")
    assert "'-3x' is no length" in refused(path, "--text", words, "--lengths", "1x,-3x", code=2)
    assert "--chunk belongs to" in refused(path, "--text", words, "--chunk", 9, code=2)
    assert "does not exist" in refused(tmp_path / "none.gguf", "--text", words, code=2)
    assert "no config.json" in refused(tmp_path, "--text", words)
    assert "--policy fixed needs a GGUF file" in refused(folder, "--text", words, "--policy", "fixed")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:50_000])
    assert "truncated" in refused(cut, "--text", words)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    assert "transformers cannot load it" in refused(broken, "--text", words)
    (broken / "config.json").write_text('{"max_position_embeddings": "many"}', encoding="utf-8")
    assert "max_position_embeddings" in refused(broken, "--text", words)


def test_ctrl_c_prints_what_was_finished(golden_gguf, words, tmp_path, monkeypatch):
    compute = ppl.window_likelihoods

    def interrupted(model, text, span, length, **options):
        if length == 256:
            raise KeyboardInterrupt
        return compute(model, text, span, length, **options)

    monkeypatch.setattr(ppl, "window_likelihoods", interrupted)
    picture = tmp_path / "a.svg"
    result = evaluate(golden_gguf("llama"), "--text", words, "--tokens", 256, "--json", "--plot", picture)
    assert result.exit_code == 130
    report = json.loads(result.stdout)
    assert [row["length"] for row in report["rows"]] == [64, 128]
    assert report["notes"][-1] == "not finished"
    assert picture.exists()


def test_lengths():
    assert LENGTHS.convert("1x,2.5x, 4096,4k", None, None) == (
        Length(factor=1), Length(factor=2.5), Length(4096), Length(4096),
    )  # fmt: skip
    assert [n.of(100) for n in (Length(factor=2.5), Length(7))] == [250, 7]


def test_names_tell_models_apart():
    assert names([Path("a/m.gguf"), Path("b/n.gguf")]) == ["m", "n"]
    assert names([Path("a/m.gguf"), Path("b/m.gguf")]) == ["a/m", "b/m"]


def test_json_has_no_numbers_that_json_lacks(capsys):
    report = Report("ppl", [Column("a", "a", lambda a: f"{a:.1f}"), Column("b", "b")])
    run(report, iter([{"a": np.float64("inf"), "b": None, "c": [np.int32(3), Path("x")]}]), as_json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == [{"a": None, "b": None, "c": [3, "x"]}]
    report.print()
    assert capsys.readouterr().out.splitlines()[1].split() == ["inf", "-"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures_have_the_same_bytes_for_the_same_numbers(golden_gguf, words, tmp_path, kind):
    pictures = [tmp_path / f"{k}.{kind}" for k in range(2)]
    for picture in pictures:
        result = evaluate(golden_gguf("llama"), "--text", words, "--tokens", 256, "--plot", picture)
        assert result.exit_code == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert len(pictures[0].read_bytes()) > 5000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_curves_are_told_apart_without_their_colours():
    styles = [curve_style(number) for number in range(20)]
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == 20
    assert len({style["color"] for style in styles[:7]}) == 7
    for style in styles:
        red, green, blue = (int(style["color"][k : k + 2], 16) / 255 for k in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.7  # seen on white


def test_many_models_make_a_picture_longer_and_not_wider(tmp_path):
    def width(path: Path) -> float:
        return float(ElementTree.parse(path).getroot().attrib["width"].removesuffix("pt")) / 72

    for count in (1, 2, 5):
        picture = tmp_path / f"{count}.svg"
        cells = [[[0.0] * 6] * 3] * count
        plot_heat_map(picture, [f"model {k}" for k in range(count)], [1024 << k for k in range(6)], [0, 50, 100], cells)
        assert width(picture) <= 8


def test_json_has_its_first_names_for_the_options(golden_gguf, words):
    settings = found(golden_gguf("llama"), "--text", words, "--lengths", "1x", "--tokens", 64)["settings"]
    assert settings["cache_type"] == "f32"
    assert settings.keys() == {
        *("text", "lengths", "tokens", "stride", "prefill", "chunk", "by", "original_context"),
        *("cache_type", "flash_attn", "policy", "clamp", "batch", "threads", "n_gpu_layers", "extend"),
    }


def test_pictures_of_what_was_not_measured(tmp_path):
    picture = tmp_path / "m.svg"
    plot_heat_map(picture, ["$a_1$", "b"], [1024, 2048], [0, 50, 100], [[[0, 1], [0.5, None], [1, 1]]] * 2)
    text = picture.read_text(encoding="utf-8")
    assert text.count("<image") >= 2
    assert text.startswith("<?xml")
    pictures = [tmp_path / f"{name}.png" for name in ("a", "_a", "c")]
    for path in pictures:
        plot_curves(path, "t", [1, 2], {path.stem: [1.0, None], "b": [None, None]}, "x", "y", marks={"L": 1})
    same, named, other = (path.read_bytes() for path in pictures)
    assert same.startswith(b"\x89PNG")
    assert same == named != other  # a name that matplotlib would hide
