"""The evaluation of the chat model: its questions about a novel, what it keeps, and the tables made of that."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import long_chat_page, pictures, questions
from benchmarks.long_chat_evaluation import ODE_FILE, SHIPPED, chosen, file, learned, measure, trained_tables
from benchmarks.long_chat_page import Figures, tables, write_page
from benchmarks.long_chat_results import METHODS, Cell, Measured, Results
from benchmarks.markdown import row
from clex_eval.records import read

pytestmark = pytest.mark.evaluation


def tokens(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def novel() -> str:
    """A book with the passages of all questions, far apart, and a paragraph longer than a short context."""
    filler = "\n\n".join(["It rained all day long, and nobody called at the house.\nThey read and sewed."] * 12)
    passages = dict.fromkeys(one.passage for one in questions.questions())
    return f"\n\n{filler}\n\n".join([*passages, "She talked on; and he sat still. " * 700])


def test_there_are_enough_questions_and_their_passages_have_the_answers():
    found = questions.questions()
    assert len(found) >= 60
    assert len({one.question for one in found}) == len(found)
    for one in found:
        assert one.answers[0].lower() in one.passage.lower(), one.question


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("The Martins had eight cows.", "eight", True),
        (" Eight\nor nine", "EIGHT", True),
        ("Nine.\nNo, eight.", "eight", False),
        ("It was four-and-twenty miles.", "four", False),
        ("It was twenty-four.", "four", False),
        ("He has 10,000 pounds.", "10", False),
        ("Weighty matters", "eight", False),
        ("of all her turkeys", "turkey", True),
        ("Broadwood's", "Broadwood", True),
        ("To Bond Street!", "Bond street", True),
        ("", "eight", False),
    ],
)
def test_an_answer_is_right_if_its_first_line_has_the_words(answer, wanted, right):
    assert questions.says(answer, [wanted]) is right
    assert questions.says(answer, ["nothing", wanted]) is right


@pytest.mark.parametrize("length", [2048, 8192])
def test_each_question_has_a_context_of_the_length_with_its_passage(novel, length):
    found = list(questions.records(tokens, length, novel))
    assert [record["input"] for record in found] == [one.question for one in questions.questions()]
    for record, one in zip(found, questions.questions(), strict=True):
        assert one.passage in record["context"]
        assert 0.6 * length < tokens(record["context"]) < length
        before = record["context"].index(one.passage) / len(record["context"])
        assert record["depth"] == pytest.approx(100 * before, abs=0.1)
    contexts = [record["context"] for record in found]
    changes = sum(a != b for a, b in pairwise(contexts))
    assert changes + 1 == len(set(contexts)) < len(contexts)  # those of one context are together


def test_contexts_without_the_novel(novel):
    assert {record["context"] for record in questions.records(tokens, 2048, novel, "none")} == {""}
    passages = [record["context"] for record in questions.records(tokens, 2048, novel, "passage")]
    assert passages == [one.passage for one in questions.questions()]


def test_another_book_is_refused(novel):
    with pytest.raises(ValueError, match="does not have the passage"):
        list(questions.records(tokens, 2048, novel.replace("Broadway Lane", "Fleet Street")))


def test_the_pieces_of_a_book_are_its_text_and_part_no_passage():
    sentences = [f"This is sentence {k} of a very long paragraph; it goes on." for k in range(200)]
    passage = " ".join(sentences[90:130])
    pieces = list(questions.pieces("A heading\n\n" + "\n".join(sentences) + "\n\nThe end.", [passage]))
    assert "".join(pieces) == "A heading\n\n" + " ".join(sentences) + "\n\nThe end.\n\n"
    assert any(passage in piece for piece in pieces)
    assert sorted(map(len, pieces))[-2] <= 1500


def test_windows_lie_side_by_side_and_the_last_is_full():
    found = questions.windows([3, 4, 5, 1, 2, 6, 2], 9)
    assert found == [range(0, 2), range(2, 5), range(5, 7)]
    assert questions.windows([4, 4, 4, 1], 9) == [range(0, 2), range(1, 4)]
    with pytest.raises(ValueError, match="more than 3"):
        questions.windows([1, 4], 3)


def test_the_questions_are_what_clex_eval_reads(novel, tmp_path):
    path = tmp_path / "novel.jsonl"
    questions.write(path, questions.records(tokens, 4096, novel))
    found = list(read(path, questions.METRIC))
    assert [record.input for record in found] == [one.question for one in questions.questions()]
    assert all(record.kind.metric == "qa_f1" for record in found)


def test_what_tells_most_is_measured_first():
    cells = chosen({"method": (), "weights": (), "kv_type": (), "task": (), "length": ()}, METHODS)
    assert cells[0] == Cell("clex", "q8_0", "f16", 16384, "passkey")
    assert {cell.task for cell in cells[:24]} == {"passkey", "perplexity"}
    first = [(cell.weights, cell.cache) == ("q8_0", "f16") for cell in cells]
    assert first == sorted(first, reverse=True)
    assert len(set(cells)) == len(cells)


def test_other_weights_and_caches_are_measured_of_the_trained_model_unless_others_are_named():
    all_of_them = {"method": (), "weights": (), "kv_type": (), "task": ("passkey",), "length": ()}
    others = [cell for cell in chosen(all_of_them, METHODS) if (cell.weights, cell.cache) != ("q8_0", "f16")]
    assert {cell.method for cell in others} == {"lora", "larger", "clex"}
    assert len(others) == 3 * 3 * 5
    assert len(chosen({**all_of_them, "method": ("yarn",)}, METHODS)) == 4 * 5


def test_an_interrupted_evaluation_goes_on_where_it_was(smollm_ntk, tmp_path):
    path = tmp_path / "results.jsonl"
    cell = Cell("ntk", "q8_0", "f16", 256, "niah_single")
    measure(cell, smollm_ntk, Results(path), trials=1, threads=1)
    (first,) = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"cell": {"method": "nt')  # the machine went down
    measure(cell, smollm_ntk, Results(path), trials=2, threads=1)
    measure(cell, smollm_ntk, Results(path), trials=2, threads=1)
    lines = path.read_text().splitlines()
    assert lines[0] == first
    assert len(lines) == 3
    found = Results(path).of({smollm_ntk.stem})
    assert [one.item for one in found] == ["0", "1"]
    assert all(one.values["score"] in (0, 1) and one.values["cpu_seconds"] > 0 for one in found)
    assert Results(path).of({"another"}) == []


def perplexity(method: str, length: int, span: int, loss: float) -> Measured:
    cell = Cell(method, "q8_0", "f16", length, "perplexity")
    return Measured(cell, method, f"{span}", {"blocks": [loss] * 64, "cpu_seconds": 1.0, "whole": True})


def key(depth: int, score: float) -> Measured:
    values = {"score": score, "cpu_seconds": 2.0 + depth, "whole": depth == 100}
    return Measured(Cell("clex", "q8_0", "f16", 16384, "passkey"), "clex", f"0 at {depth}", values)


def test_tables_compare_only_what_all_have_read():
    found = [
        perplexity("plain", 8192, 0, 3.0), perplexity("plain", 8192, 1, 9.0),
        perplexity("yarn", 8192, 0, 3.01), perplexity("yarn", 32768, 0, 3.02),
    ]  # fmt: skip
    made = tables(Figures(found))
    assert row(["plain RoPE", "", "", "20.09", "", ""]) in made["perplexity"].splitlines()
    changes = row(["YaRN, not trained", "", "+1.0 ± 0.0 %", "", "+1.0 ± 0.0 %"])
    assert changes in made["changes of perplexity"].splitlines()
    assert row(["YaRN, not trained", *["20.49"] * 8]) in made["positions"].splitlines()
    assert made["RULER"] == "Not measured yet."


def test_the_mean_of_tasks_is_given_once_all_are_measured():
    tasks = ["niah_single", "niah_multikey", "variable_tracking", "common_words", "frequent_words"]
    found = [
        Measured(Cell("clex", "q4_k_m", "q8_0", 8192, task), "clex", "0", {"score": k / 4, "whole": True})
        for k, task in enumerate(tasks)
    ]
    wanted = row(["**CLEX, trained**", "q4_k_m, q8_0", "", "", "", "", "50", "", "", ""])
    assert wanted in tables(Figures(found))["weights and caches"].splitlines()
    assert wanted not in tables(Figures(found[1:]))["weights and caches"].splitlines()


def test_tables_of_answers_say_of_how_many_they_are():
    made = tables(Figures([key(100, 1.0), key(50, 0.0)]))
    assert row(["**CLEX, trained**", "", "", "", "50 (2)", ""]) in made["pass keys"].splitlines()
    depths = made["pass keys by depth"].splitlines()
    assert row(["CLEX, trained", "100 %", "", "", "", "100", ""]) in depths
    assert row(["CLEX, trained", "50 %", "", "", "", "0", ""]) in depths
    assert len(depths) == 4
    times = row(["q8_0, f16", "the whole prompt read", "", "", "", "102.0", ""])
    assert times in made["time"].splitlines()


def test_the_page_has_tables_and_pictures_of_what_is_measured(tmp_path, monkeypatch):
    page = tmp_path / "long-chat.md"
    page.write_bytes(long_chat_page.DOCUMENT.read_bytes())
    monkeypatch.setattr(long_chat_page, "DOCUMENT", page)
    monkeypatch.setattr(long_chat_page, "DOCS", tmp_path)
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    write_page([])
    assert page.read_text().count("\nNot measured yet.\n") == 9
    assert list(tmp_path.iterdir()) == [page]
    other = Measured(Cell("yarn", "q8_0", "f16", 32768, "passkey"), "yarn", "0 at 75", key(75, 1.0).values)
    write_page([key(100, 1.0), key(50, 0.0), other, perplexity("yarn", 8192, 0, 3.0)])
    assert {path.name for path in tmp_path.glob("*.svg")} == {"long-chat-passkey.svg", "long-chat-perplexity.svg"}
    assert page.read_text().count(".svg)\n") == 2
    write_page([perplexity("yarn", 32768, 0, 3.0), perplexity("clex", 32768, 0, 2.0)])
    assert "![Perplexity by position in a long window](long-chat-positions.svg)" in page.read_text()
    assert (tmp_path / "long-chat-positions.svg").exists()


def test_the_file_of_the_trained_model_is_another_for_another_adapter(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    names = []
    for name, content in (
        ("adapter_model.safetensors", b"a"), ("adapter_model.safetensors", b"b"), (ODE_FILE, b"a"), (ODE_FILE, b"b"),
        ("config.json", b"{}"),
    ):  # fmt: skip
        (adapter / name).write_bytes(content)
        names.append(file("clex", "q8_0", adapter).stem)
    assert len(set(names)) == 5
    assert file("lora", "q8_0", adapter) != file("clex", "q8_0", adapter)
    assert file("yarn", "q8_0", adapter) == file("yarn", "q8_0", SHIPPED)


def test_the_tables_are_those_that_the_adapter_was_trained_with(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    assert trained_tables(tmp_path) == (8192, 4)
    config = {"max_position_embeddings": 11264, "rope_scaling": {"type": "clex", "max_factor": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_tables(tmp_path) == (11264, 3)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", ODE_FILE])
def test_a_layer_that_has_not_moved_is_no_model_of_its_own(tmp_path, name):
    layer = {"x.ode_up_proj": np.ones((2, 4), np.float32), "x.ode_down_proj": np.zeros((4, 2), np.float32)}
    save_file({"a.lora_A.weight": np.ones((1, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    assert not learned(tmp_path)
    save_file(layer, tmp_path / name)
    assert not learned(tmp_path)
    layer["x.ode_down_proj"][1, 1] = 1e-3
    save_file(layer, tmp_path / name)
    assert learned(tmp_path)
