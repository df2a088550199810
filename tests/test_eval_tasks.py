"""The generated tasks of clex-eval: prompts of the exact size, needles at their depth, scores, answers of a model."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest

from clex_eval.haystack import FILLER, filler, hide, words
from clex_eval.loading import open_for_evaluation
from clex_eval.options import Length
from clex_eval.passkey import passkey as passkey_rows
from clex_eval.passkey import question as passkey
from clex_eval.passkey import score as passkey_score
from clex_eval.ruler import TASKS, niah_multikey, ruler, score
from clex_eval.tasks import in_groups
from clex_local.errors import ClexError

pytestmark = pytest.mark.evaluation


@pytest.fixture(scope="module")
def model(smollm):
    with open_for_evaluation(smollm, ctx=1024, threads=1) as model:
        yield model


@pytest.fixture(scope="module", params=["llama", "phi2"])
def tiny(golden_gguf, request):
    """Models whose small vocabularies take several tokens for a word; the second has no chat template."""
    with open_for_evaluation(golden_gguf(request.param), ctx=256, threads=1) as model:
        yield model


def text_of(model, question):
    return model.detokenize(question.prompt)


@pytest.mark.parametrize("length", [256, 700, 2048, 5001])
@pytest.mark.parametrize("depth", [0, 33, 100])
def test_passkey_prompts_fill_the_length_to_the_token(model, length, depth):
    question = passkey(model, length, random.Random(length), depth)
    assert len(question.prompt) + question.max_tokens == length


@pytest.mark.parametrize("length", [800, 1111])
def test_they_do_with_a_vocabulary_of_small_pieces(tiny, length):
    for depth in (0, 50, 100):
        question = passkey(tiny, length, random.Random(0), depth)
        assert len(question.prompt) + question.max_tokens == length
    begun = "[assistant] The" if "llama" in tiny.name else "\nThe"
    assert text_of(tiny, question).endswith(f"What is the pass key?{begun} pass key is")


@pytest.mark.parametrize("depth", [0, 25, 50, 75, 100])
def test_the_needle_is_at_its_depth(model, depth):
    question = passkey(model, 3000, random.Random(1), depth)
    (key,) = question.expected
    text = text_of(model, question)
    assert text.count(key) == 2
    before, after = text[: text.index("The pass key is " + key)], text[text.rindex(key) :]
    sentence = re.compile("|".join(re.escape(part + ".") for part in FILLER.strip(" .").split(". ")))
    whole = len(sentence.findall(before)), len(sentence.findall(after))
    assert whole[0] / sum(whole) * 100 == pytest.approx(depth, abs=1)


def test_the_text_before_the_needle_is_the_same_at_every_depth(model):
    # What lets a runtime keep it in its cache from one depth to the next.
    shallow, deep = (passkey(model, 2000, random.Random(3), depth).prompt for depth in (50, 100))
    same = next(place for place, (a, b) in enumerate(zip(shallow, deep, strict=True)) if a != b)
    assert same > 900


@pytest.mark.parametrize("task", TASKS)
def test_ruler_tasks_depend_on_nothing_but_their_seed(model, task):
    one, same, other = (TASKS[task](model, 2048, random.Random(seed)) for seed in ("a", "a", "b"))
    assert one == same
    assert one.prompt != other.prompt
    assert one.expected != other.expected


@pytest.mark.parametrize("length", [1500, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_ruler_tasks_fill_their_length_and_hold_their_answers(model, task, length):
    question = TASKS[task](model, length, random.Random(5))
    total = len(question.prompt) + question.max_tokens
    if task in ("common_words", "frequent_words"):  # made of whole words
        assert length - 30 < total <= length
    else:
        assert total == length
    text = text_of(model, question)
    assert all(expected in text for expected in question.expected)
    assert question.max_tokens >= len(model.tokenize(" " + " ".join(question.expected)))


def test_variables_follow_from_the_number(model):
    question = TASKS["variable_tracking"](model, 1000, random.Random(2))
    text = text_of(model, question).rsplit("Follow the chain", 1)[1]
    number = re.search(r"have the value (\d+)", text)[1]
    values = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))

    def value(name):
        return value(values[name]) if name in values else name

    assert {name for name in values if value(name) == number} == set(question.expected)
    assert len(question.expected) == 5


@pytest.mark.parametrize(("task", "count"), [("common_words", 10), ("frequent_words", 3)])
def test_the_expected_words_are_those_that_come_most_often(model, task, count):
    question = TASKS[task](model, 3000, random.Random(2))
    text = text_of(model, question).rsplit(" below", 1)[1].rsplit("Question", 1)[0]
    text = text.split("\n", 1)[1]
    found = re.findall(r"[a-z]{6}", text)
    often = sorted(set(found), key=found.count, reverse=True)
    assert set(often[:count]) == set(question.expected)
    assert found.count(often[count - 1]) > found.count(often[count])


def test_one_of_several_needles_is_asked_for(model):
    question = niah_multikey(model, 1024, random.Random(9), 50)
    text = text_of(model, question)
    needles = dict(re.findall(r"The secret number of (\w+) is (\d+)\.", text))
    assert len(needles) == 4
    asked = re.search(r"What is the secret number of (\w+)", text)[1]
    assert question.expected == (needles[asked],)
    assert text.index(needles[asked]) / len(text) == pytest.approx(0.5, abs=0.1)


def test_needles_go_between_sentences():
    text = filler(len(FILLER) - 4)
    assert text == "The river is wide. The hill is high. The road is long. We walk on. Then we turn ba"
    hidden = hide(text, [(100, "Z."), (0, "A."), (49, "M."), (49, "N.")])
    assert hidden == "A. The river is wide. The hill is high. M. N. The road is long. We walk on. Z. Then we turn ba"
    assert hide("", [(50, "A.")]) == "A."


def test_invented_words_are_no_parts_of_each_other():
    found = words(random.Random(0), 3000)
    assert len(set(found)) == 3000
    assert {len(word) for word in found} == {6}


def test_scores_are_the_share_of_the_expected_strings():
    assert score("They are FKUYB, cnzrs.", ("FKUYB", "CNZRS", "DZJEP", "LPJPX")) == 0.5
    assert score("", ("1",)) == 0
    assert score("It is 8451554", ("8451554",)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_for_the_task_is_refused(model, task):
    with pytest.raises(ClexError, match=r"take .* tokens more than that|leaves no room"):
        TASKS[task](model, 60, random.Random(0))


def clex_eval(*arguments):
    """Runs a command; its exit code, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "clex_eval.cli", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def one_line(code, output, error):
    assert code in (1, 2)
    assert not output
    assert error.startswith("clex-eval: error: ")
    assert error.count("\n") == 1
    return error


def test_a_model_finds_the_pass_key(smollm):
    (row,) = passkey_rows([smollm], [Length(512)], depths=(50.0,), threads=1)
    assert (row["length"], row["50"], row["all"]) == (512, 1, 1)
    assert row["answers"][0]["expected"][0] in row["answers"][0]["answer"]


def test_the_deepest_needles_are_asked_for_first_each_with_its_own_key(smollm):
    rows = list(passkey_rows([smollm], [Length(128), Length(140)], depths=(0.0, 100.0), trials=2, threads=1))
    assert [(row["length"], row["0"], row["100"]) for row in rows] == [(128, 1, 1), (140, 1, 1)]
    answers = rows[0]["answers"]
    assert [(answer["depth"], answer["trial"]) for answer in answers] == [(100, 0), (100, 1), (0, 0), (0, 1)]
    assert len({answer["expected"] for answer in answers}) == 4


def test_a_pass_key_is_right_to_the_digit():
    assert passkey_score(" 12345.", ("12345",)) == 1
    assert passkey_score(" 123456.", ("12345",)) == 0
    assert passkey_score(" 54321, not 12345", ("12345",)) == 0
    assert passkey_score(" hidden", ("12345",)) == 0


def test_models_are_compared_in_one_table(smollm, tmp_path):
    other = tmp_path / "other.gguf"
    other.symlink_to(smollm)
    picture = tmp_path / "cells.png"
    code, output, error = clex_eval(
        "passkey", smollm, other, "--lengths", "128,140", "--depths", "50", "--threads", "1", "--plot", picture
    )
    assert code == 0, error
    assert not error
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["model", "tokens", "t", "50", "%", "all"]
    assert [line[:3] for line in lines[1:]] == [
        [name, length, "-"] for name in (smollm.stem, "other") for length in ("128", "140")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ruler_as_json(smollm):
    code, output, error = clex_eval(
        "ruler", smollm, "--tasks", "niah_single,niah_multikey", "--lengths", "200", "--threads", "1", "--json"
    )
    assert code == 0, error
    found = json.loads(output)
    assert found["settings"]["tasks"] == ["niah_single", "niah_multikey"]
    assert [(row["task"], row["200"], row["all"]) for row in found["rows"]] == [
        ("niah_single", 1, 1),
        ("niah_multikey", 1, 1),
    ]


def test_ruler_has_a_row_for_each_depth(smollm):
    rows = list(ruler([smollm], [Length(128)], tasks=["niah_single"], depths=[0.0, 100.0], threads=1))
    assert [(row["depth"], row["128"]) for row in rows] == [(0, 1), (100, 1)]


def test_an_unfinished_group_comes_before_the_interrupt():
    def interrupted():
        yield from ("a1", "a2", "b1")
        raise KeyboardInterrupt

    groups = in_groups(interrupted(), lambda text: text[0])
    assert [next(groups), next(groups)] == [["a1", "a2"], ["b1"]]
    with pytest.raises(KeyboardInterrupt):
        next(groups)


def test_what_was_finished_is_shown_before_an_error(smollm):
    code, output, error = clex_eval(
        "ruler", smollm, "--tasks", "niah_single,common_words", "--lengths", "128", "--threads", "1"
    )
    assert code == 1
    assert "niah_single" in output
    assert "not finished" in output
    assert "common_words in 128 tokens" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["passkey", "MODEL", "--lengths", "40"], "passkey in 40 tokens"),
        (["passkey", "MODEL", "--depths", "0,101"], "'0,101'"),
        (["passkey", "MODEL", "--depths", "nan"], "'nan'"),
        (["passkey", "missing.gguf"], "missing.gguf"),
        (["passkey", "MODEL", "--plot", "picture.gif"], "picture.gif"),
        (["ruler", "MODEL", "--tasks", "niah"], "'niah' is none of"),
    ],
)
def test_bad_input_is_told_in_one_line(smollm, arguments, message):
    done = clex_eval(*[smollm if argument == "MODEL" else argument for argument in arguments])
    assert message in one_line(*done)


def test_tables_that_end_before_a_length_are_refused(golden_gguf):
    assert "its tables cover 256 tokens, not 300" in one_line(
        *clex_eval("passkey", golden_gguf("llama"), "--lengths", "300")
    )
