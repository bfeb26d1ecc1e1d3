"""The demo's examples: right answers, and a hold-out that training never sees."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.tasks import (
    LARGEST_ADDEND,
    LONGEST_ANSWER,
    LONGEST_PROMPT,
    LONGEST_WORD,
    SHORTEST_WORD,
    TASKS,
    exact,
    held_out,
    holdout,
    mixed_holdout,
    solve,
    training_examples,
    words,
)

addends = st.integers(0, LARGEST_ADDEND)
letters = st.text("abcdefghijklmnopqrstuvwxyz", min_size=SHORTEST_WORD, max_size=LONGEST_WORD)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("17 + 58 =", "75"),
        ("0 + 0 =", "0"),
        ("99 + 99 =", "198"),
        ("reverse stone =", "enots"),
        ("sort stone =", "enost"),
        ("sort banana =", "aaabnn"),
        ("reverse ant =", "tna"),
    ],
)
def test_solve_gives_known_answers(prompt: str, answer: str) -> None:
    assert solve(prompt) == answer
    assert exact(prompt, answer)


@pytest.mark.parametrize("answer", ["76", " 75", "75 ", "75\n", "075", "", "75="])
def test_only_the_answer_to_the_letter_is_exact(answer: str) -> None:
    assert not exact("17 + 58 =", answer)


@pytest.mark.parametrize(
    "prompt",
    ["", "17 + 58", "17+58 =", "100 + 1 =", "07 + 1 =", "٣ + 4 =", "sort ab =", "sort letters =", "sort Stone =", "x"],
)
def test_other_prompts_are_refused(prompt: str) -> None:
    for ask in (solve, held_out):
        with pytest.raises(ValueError, match="not a prompt"):
            ask(prompt)


@given(addends, addends)
def test_both_orders_of_a_sum_are_on_one_side(a: int, b: int) -> None:
    assert held_out(f"{a} + {b} =") == held_out(f"{b} + {a} =")


@given(letters)
def test_both_tasks_of_a_word_are_on_one_side(word: str) -> None:
    assert held_out(f"reverse {word} =") == held_out(f"sort {word} =")


def test_training_and_holdout_are_disjoint() -> None:
    trained = list(islice(training_examples(random.Random(1)), 10_000))
    kept = {example.prompt for task in TASKS for example in holdout(task, 900)}
    assert kept.isdisjoint(example.prompt for example in trained)
    # Not by luck: the hold-out is a tenth of all sums, and training draws many different ones.
    everything = [f"{a} + {b} =" for a in range(LARGEST_ADDEND + 1) for b in range(LARGEST_ADDEND + 1)]
    assert sum(map(held_out, everything)) == pytest.approx(len(everything) / 10, rel=0.1)
    assert {example.task for example in trained} == set(TASKS)
    assert len({example.prompt for example in trained if example.task == "add"}) > 1500


def test_sums_of_single_digits_are_never_held_out() -> None:
    assert not any(held_out(f"{a} + {b} =") for a in range(10) for b in range(10))


def test_every_real_word_is_held_out() -> None:
    trained = islice(training_examples(random.Random(2)), 10_000)
    assert not {example.prompt.split(" ")[1] for example in trained} & set(words())
    assert all(held_out(f"sort {word} =") for word in words())


def test_words_are_sorted_unique_and_within_the_task() -> None:
    assert list(words()) == sorted(set(words()))
    assert len(words()) > 300
    assert all(SHORTEST_WORD <= len(word) <= LONGEST_WORD and word.islower() and word.isascii() for word in words())


@pytest.mark.parametrize("task", TASKS)
def test_holdout_is_repeatable_distinct_and_right(task: str) -> None:
    examples = holdout(task, 600, seed=3)
    assert examples == holdout(task, 600, seed=3)
    assert examples != holdout(task, 600, seed=4)
    assert len({example.prompt for example in examples}) == 600
    for example in examples:
        assert example.task == task
        assert held_out(example.prompt)
        assert exact(example.prompt, example.answer)
        assert len(example.prompt) <= LONGEST_PROMPT
        assert len(example.answer) <= LONGEST_ANSWER


def test_mixed_holdout_takes_the_tasks_in_turn() -> None:
    examples = mixed_holdout(301)
    assert [example.task for example in examples[:4]] == ["add", "reverse", "sort", "add"]
    assert len({example.prompt for example in examples}) == len(examples) == 301
    assert all(example.prompt.split(" ")[1] in words() for example in examples if example.task != "add")


def test_more_sums_than_are_held_out_are_refused() -> None:
    with pytest.raises(ValueError, match="additions are held out"):
        holdout("add", 5000)
