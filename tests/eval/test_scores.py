"""Scores of answers against examples worked by hand, from the benchmarks' papers and scripts."""

from collections.abc import Sequence

import pytest
from rapidfuzz.distance import Levenshtein

from kvcapsule.data.batches import Question
from kvcapsule.eval.scores.demo import demo_score
from kvcapsule.eval.scores.edits import anls, character_score, error_rate, word_score
from kvcapsule.eval.scores.exact import exact, relaxed_exact
from kvcapsule.eval.scores.multiple_choice import chosen, multiple_choice
from kvcapsule.eval.scores.relaxed_accuracy import relaxed_accuracy
from kvcapsule.eval.scores.scorer import METRICS, Scorer
from kvcapsule.eval.scores.target import Target
from kvcapsule.eval.scores.vqa import normalized, vqa_accuracy


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_error_rate_counts_edits_per_unit_of_the_right_text(a: str, b: str, distance: int) -> None:
    assert Levenshtein.distance(list(a), list(b)) == distance
    assert error_rate(a, b) == distance / max(1, len(b))


@pytest.mark.parametrize(
    ("answer", "right", "characters", "words"),
    [
        ("ant 12\nbee 35\n", "ant 12\nbee 34", 1 - 1 / 13, 3 / 4),
        ("ant 12 bee 34", "ant 12\nbee 34", 1 - 1 / 13, 1.0),
        ("rambling on and on", "ant", 0.0, 0.0),
        ("the cat sat", "the cat", 1 - 4 / 7, 1 / 2),
        ("", "", 1.0, 1.0),
    ],
)
def test_character_and_word_scores(answer: str, right: str, characters: float, words: float) -> None:
    assert character_score(answer, Target((right,))) == pytest.approx(characters)
    assert word_score(answer, Target((right,))) == pytest.approx(words)
    assert character_score(answer, Target(("no such text", right))) == pytest.approx(characters)


@pytest.mark.parametrize(
    ("task", "answer", "right", "score"),
    [
        ("transcribe", "ant 12\nbee 34", "ant 12\nbee 34", 1.0),
        ("transcribe", "ant 12\nbee 35\n", "ant 12\nbee 34", 1 - 1 / 13),
        ("transcribe", "rambling on and on", "ant", 0.0),
        ("value", " 341\n", "341", 1.0),
        ("value", "342", "341", 0.0),
        ("count", "1", "10", 0.0),
        ("count", "42(1)\n2(2)\n2", "4\n7\n2", 1.0),
        ("count", "42(1)\n2(2)\n3", "42(1)\n2(2)\n2", 0.0),
        ("lookup", "ant\nfox 42", "ant\nbee\nfox 42", 1.0),
        ("lookup", "ant\nfox", "ant\nfox 42", 0.0),
        ("lookup", "", "42", 0.0),
        ("line", "Ant 12", "ant 12", 0.0),
    ],
)
def test_demo_score(task: str, answer: str, right: str, score: float) -> None:
    assert demo_score(answer, Target((right,), task=task)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Red.", "red"),
        ("The  dog,\tand a cat!", "dog and cat"),
        ("Two", "2"),
        ("none", "0"),
        ("3.5", "3.5"),
        ("1,000 men", "1000 men"),
        ("yes/no", "yes no"),
        ("dont know", "don't know"),
        ("Couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("U.S.", "us"),
        ("A", "a"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalisation_is_that_of_vqa(text: str, normal: str) -> None:
    assert normalized(text) == normal


def test_exact_and_relaxed_exact() -> None:
    target = Target(("red", "dark red"))
    assert [exact(text, target) for text in (" red\n", "Red.", "dark red", "blue")] == [1, 0, 1, 0]
    assert [relaxed_exact(text, target) for text in ("Red.", "A dark red!", "blue", "", "re d")] == [1, 1, 0, 0, 0]
    assert relaxed_exact("the", Target(("a",))) == relaxed_exact("", Target(("?",))) == 0


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_person_out_in_turn(matches: int, score: float) -> None:
    accepted = ("Two",) * matches + tuple(f"other {i}" for i in range(10 - matches))
    assert vqa_accuracy("2.", Target(accepted)) == pytest.approx(score)


def test_vqa_accuracy_of_one_person() -> None:
    assert vqa_accuracy("yes", Target(("Yes",))) == 1 and vqa_accuracy("no", Target(("yes",))) == 0


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Hello  World", ("hello world",), 1.0),
        ("hallo world", ("hello world",), 10 / 11),
        ("aaaa", ("aabb",), 0.5),
        ("aaab", ("abbb", "cccc"), 0.5),
        ("abb", ("aaa",), 0.0),
        ("1/8/93", ("1/8/93", "1993"), 1.0),
        ("", ("5",), 0.0),
    ],
)
def test_anls(answer: str, accepted: tuple[str, ...], score: float) -> None:
    assert anls(answer, Target(accepted)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("104", "100", 1),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-96", "-100", 1),
        ("0.5", "50%", 1),
        ("52%", "50%", 1),
        ("50", "50%", 0),
        ("1,020", "1000", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("brazil", "Brazil", 1),
        ("Brasil", "Brazil", 0),
        ("nan", "5", 0),
        ("inf", "5", 0),
    ],
)
def test_relaxed_accuracy_of_charts(answer: str, right: str, score: float) -> None:
    assert relaxed_accuracy(answer, Target((right,))) == score


COLOURS = ("red", "dark green", "blue")


@pytest.mark.parametrize(
    ("answer", "choices", "option"),
    [
        *((form, COLOURS, 1) for form in ("B", "b", "B.", "(B)", "B)", "**B**", "B: dark green", "[b] dark green")),
        *((form, COLOURS, 1) for form in ("Answer: B", "The answer is (B).", "answer: b", "Is it A? The answer is B")),
        *(
            (form, COLOURS, 1)
            for form in ("Dark green.", "It is dark green", "B\nbecause of the leaves", "B dark green")
        ),
        ("The answer is a colour", COLOURS, None),
        ("red or blue", COLOURS, None),
        ("D", COLOURS, None),
        ("reddish", COLOURS, None),
        ("", COLOURS, None),
        ("A cat", ("a dog", "a cat"), 1),
        ("1", ("2", "1"), 1),
        ("D", (), 3),
        ("(d) red", (), 3),
        ("red", (), None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, choices: tuple[str, ...], option: int | None) -> None:
    assert chosen(answer, choices) == option


@pytest.mark.parametrize(
    ("answer", "right", "choices", "score"),
    [
        ("(B)", "B", COLOURS, 1),
        ("dark green", "B", COLOURS, 1),
        ("B.", "dark green", COLOURS, 1),
        ("A", "dark green", COLOURS, 0),
        ("I cannot tell", "B", COLOURS, 0),
        ("Answer: C", "C", (), 1),
        ("Red.", "red", (), 1),
        ("blue", "red", (), 0),
    ],
)
def test_multiple_choice(answer: str, right: str, choices: tuple[str, ...], score: float) -> None:
    assert multiple_choice(answer, Target((right,), choices)) == score


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_1_for_the_right_answer_and_0_for_another(metric: str) -> None:
    target = Target(("red", "red", "red", "red"), task="colour")
    assert METRICS[metric]("red", target) == 1 and METRICS[metric]("42", target) == 0


def _choice(source: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> str:
    return Scorer(source=source).metric_for(Target(tuple(accepted), tuple(choices), "count"))


def test_auto_chooses_by_the_source_and_the_question() -> None:
    assert [_choice(source, ["2"]) for source in ("pages", "pages-tall", "emoji", "pictures")] == ["demo"] * 4
    assert _choice("my.jsonl", ["2"]) == _choice("my.jsonl", ["2", "two"]) == "relaxed-exact"
    assert _choice("my.jsonl", ["2"] * 10) == "vqa"
    assert _choice("my.jsonl", ["2"], COLOURS) == "multiple-choice"
    assert Scorer("anls", "pages").metric_for(Target(("2",))) == "anls"


def test_tasks_of_other_data_are_not_judged_by_the_demos_rules() -> None:
    """A task of a stranger that is named as one of the demo's."""
    question = Question([], "How many?", "2", "count", ("2",))
    assert Scorer(source="my.jsonl").score(question, "There are 2") == (0.0, "relaxed-exact")
    assert Scorer(source="my.jsonl").score(question, "Two.") == (1.0, "relaxed-exact")
    assert Scorer(source="pages").score(question, "There are 2") == (1.0, "demo")
    assert Scorer("exact", "pages").score(question, "There are 2") == (0.0, "exact")
