"""Files in LongBench's format: how they are read, truncated, answered and scored."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from clex_eval.loading import open_for_evaluation
from clex_eval.longbench import longbench, prompt_tokens
from clex_eval.metrics import score
from clex_eval.records import DATA_SETS, read
from clex_local.errors import ClexError

pytestmark = pytest.mark.evaluation

CITY = "The town of Vellmar lies on a hill. " * 40 + "Its mayor is Anna Lindqvist. " + "The streets are narrow. " * 40


def record(**fields):
    """A line in LongBench's format."""
    plain = {
        "input": "Who is the mayor?",
        "context": CITY,
        "answers": ["Anna Lindqvist"],
        "length": 500,
        "dataset": "multifieldqa_en",
        "language": "en",
        "all_classes": None,
        "_id": "0001",
    }
    return plain | fields


@pytest.fixture
def jsonl(tmp_path):
    def write(*records, name="records.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(fields) + "\n" for fields in records), encoding="utf-8")
        return path

    return write


def points(jsonl, answer, **fields):
    (found,) = read(jsonl(record(**fields)))
    return score(found, answer)


@pytest.fixture(scope="module")
def model(smollm):
    with open_for_evaluation(smollm, ctx=512, threads=1) as model:
        yield model


def test_words_in_common_count_for_questions(jsonl):
    assert points(jsonl, "The mayor is Anna Lindqvist.") == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))
    assert points(jsonl, "anna  LINDQVIST!") == 1
    assert points(jsonl, "Vellmar") == 0
    assert points(jsonl, "") == 0
    assert points(jsonl, "in 1923", answers=["1920", "the 1923"]) == pytest.approx(2 / 3)  # the best of the answers


def test_the_longest_common_sequence_counts_for_summaries(jsonl):
    summary = {"dataset": "gov_report", "answers": ["the council voted to build a bridge"]}
    assert points(jsonl, "The council voted to build a bridge.", **summary) == 1
    # of 7 words on either side, "the council to build a" comes in order
    assert points(jsonl, "The council plans to build a road.", **summary) == pytest.approx(5 / 7)


def test_chinese_is_compared_by_characters(jsonl):
    chinese = {"dataset": "multifieldqa_zh", "language": "zh", "answers": ["安娜是市长"]}
    assert points(jsonl, "安娜是市长。", **chinese) == 1
    assert points(jsonl, "市长", **chinese) == pytest.approx(2 * 1 * (2 / 5) / (1 + 2 / 5))
    assert points(jsonl, "市长是安娜", **{**chinese, "dataset": "dureader"}) == pytest.approx(2 / 5)


def test_the_only_class_named_is_the_answer(jsonl):
    classes = {"dataset": "trec", "answers": ["City"], "all_classes": ["City", "Country", "City name", "Ci"]}
    assert points(jsonl, "City", **classes) == 1  # "Ci" is a part of it
    assert points(jsonl, "City or Country", **classes) == 0.5
    assert points(jsonl, "Country", **classes) == 0
    assert points(jsonl, "\nCity\nQuestion: Country?", **classes) == 1  # the first line is the answer


def test_numbers_are_counted(jsonl):
    retrieval = {"dataset": "passage_retrieval_en_e", "answers": ["Paragraph 12"]}
    assert points(jsonl, "It is Paragraph 12.", **retrieval) == 1
    assert points(jsonl, "Paragraph 12 or 1", **retrieval) == 0.5
    assert points(jsonl, "Paragraph 2", **retrieval) == 0
    assert points(jsonl, "7", dataset="passage_count", answers=["7"]) == 1
    assert points(jsonl, "none", dataset="passage_count", answers=["7"]) == 0


def test_the_first_line_of_code_is_compared(jsonl):
    code = {"dataset": "lcc", "answers": ["return total + 1"]}
    assert points(jsonl, "```python\n# sum\nreturn total + 1\nreturn 0", **code) == 1
    # 14 letters in common of 16 + 14
    assert points(jsonl, "return total +", **code) == pytest.approx(2 * 14 / 30)
    assert points(jsonl, "", **code) == 0


def test_every_data_set_can_be_scored(jsonl):
    for name in DATA_SETS:
        fields = {"dataset": name, "answers": ["Paragraph 3"], "all_classes": ["Paragraph 3"]}
        if name == "passage_count":
            fields["answers"] = ["3"]
        assert points(jsonl, "Paragraph 3", **fields) == 1, name


def test_a_prompt_that_does_not_fit_loses_its_middle(model, jsonl):
    (found,) = read(jsonl(record(context=f"FIRST {CITY * 3} LAST")))
    tokens, full = prompt_tokens(model, found)
    assert full > 512
    assert 512 - found.kind.max_tokens - 3 <= len(tokens) <= 512 - found.kind.max_tokens
    text = model.detokenize(tokens)
    assert "FIRST The town" in text
    assert "narrow.  LAST" in text
    assert "Read the text" in text
    assert "Question: Who is the mayor?\nAnswer:" in text
    assert text.rstrip().endswith("assistant")  # the chat template is not truncated
    short = replace(found, context="Anna Lindqvist is the mayor.")
    tokens, full = prompt_tokens(model, short)
    assert len(tokens) == full
    assert "text.\n\nAnna" in model.detokenize(tokens)


def test_text_in_braces_is_not_filled_in(model, jsonl):
    (found,) = read(jsonl(record(context="int main() {input} {0} {context}", dataset="lcc", input="x")))
    assert model.detokenize(prompt_tokens(model, found)[0]) == "int main() {input} {0} {context}x"


def test_records_are_answered_and_scored(smollm, jsonl):
    mayor = record(context=CITY[1300:1700])
    file = jsonl(mayor, {**mayor, "_id": "0002"}, record(context=CITY * 2, dataset="hotpotqa"))
    rows = list(longbench([smollm], [file], ctx=256, limit=1, threads=1))
    assert [(row["dataset"], row["metric"], row["records"], row["truncated"]) for row in rows] == [
        ("multifieldqa_en", "qa_f1", 1, 0),
        ("hotpotqa", "qa_f1", 1, 1),
    ]
    assert "Lindqvist" in rows[0]["answers"][0]["answer"]
    assert rows[0]["score"] == rows[0]["answers"][0]["score"] > 0
    assert rows[0]["answers"][0]["id"] == "0001"


def test_own_data_sets_prompts_and_pictures(smollm, jsonl, tmp_path):
    prompt, picture = tmp_path / "prompt.txt", tmp_path / "curve.svg"
    prompt.write_text("{context}\nIn one word: {input}", encoding="utf-8")
    file = jsonl(record(dataset="mine", input="What colour is grass?", context="Grass is green.", answers=["green"]))
    arguments = [smollm, file, "--metric", "qa_f1", "--prompt", prompt, "--ctx", "256", "--threads", "1"]
    code, output, error = clex_eval(*arguments, "--plot", picture)
    assert code == 0, error
    assert output.splitlines()[0].split() == ["model", "data", "set", "metric", "records", "truncated", "score"]
    assert output.splitlines()[1].split()[1:5] == ["mine", "qa_f1", "1", "0"]
    assert "<svg" in picture.read_text(encoding="utf-8")


def clex_eval(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "clex_eval.cli", "longbench", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps(record(context=None)), "the field context"),
        (json.dumps(record(answers="one")), "the field answers"),
        (json.dumps(record(answers=[])), "has no answers"),
        (json.dumps(record(dataset="mine")), "`metric`"),
        (json.dumps(record(dataset="trec")), "all_classes"),
    ],
)
def test_bad_records_are_named_by_their_line(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ClexError, match=message) as error:
        list(read(path))
    assert f"{path}, line 2: " in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "has no records"), (b"\xff\xfe", "not UTF-8")])
def test_bad_files_are_refused_before_a_model_is_opened(smollm, tmp_path, content, message):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    code, output, error = clex_eval(smollm, path)
    assert (code, output) == (1, "")
    assert message in error
    assert error.count("\n") == 1


def test_a_model_and_a_file_are_needed(smollm):
    assert "at least one model and one FILE.jsonl" in clex_eval(smollm)[2]


def test_a_context_without_room_is_refused(smollm, jsonl):
    code, output, error = clex_eval(smollm, jsonl(record()), "--ctx", "80", "--threads", "1")
    assert (code, output) == (1, "")
    assert "a context of 80 tokens has no room for a prompt and its answer" in error
