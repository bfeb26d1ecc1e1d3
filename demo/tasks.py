"""Three small tasks whose answers can be checked, and the split of their examples into training and hold-out.

    17 + 58 =        →  75        two numbers from 0 to 99
    reverse stone =  →  enots     a word of 3 to 6 letters
    sort stone =     →  enost     its letters in alphabetical order

Imports no torch, because the command line makes prompts and checks answers with it where none is installed.
"""

# The equals sign is not decoration: with characters for tokens, nothing else tells where a prompt ends and its answer
# begins, and `17 + 5` answered with the 2 of 22 would read like the prompt `17 + 52`.
#
# An example's *subject* decides its side: the word, or the unordered pair of addends. One subject in ten is held out by
# its hash, and so is every real word of `words.txt`: the model is trained on random letters only, so a prompt about a
# garden is about a word that it has never seen, in either task. Sums of single digits are never held out: that table is
# learnt by heart, as there is nothing to infer 0 + 1 from.

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from string import ascii_lowercase

LARGEST_ADDEND = 99
LARGEST_DIGIT = 9
SHORTEST_WORD, LONGEST_WORD = 3, 6
LONGEST_PROMPT = len("reverse ") + LONGEST_WORD + len(" =")
LONGEST_ANSWER = LONGEST_WORD
HELD_OUT_ONE_IN = 10

Rng = random.Random

_ADD = re.compile(r"(0|[1-9][0-9]?) \+ (0|[1-9][0-9]?) =")
_WORD = re.compile(rf"(reverse|sort) ([a-z]{{{SHORTEST_WORD},{LONGEST_WORD}}}) =")


@dataclass(frozen=True)
class Example:
    """One prompt of one task, with the only answer that counts as right."""

    task: str
    prompt: str
    answer: str


@cache
def words() -> tuple[str, ...]:
    """The real words that ship with the demo, in alphabetical order; all of them are held out."""
    return tuple((files("demo") / "words.txt").read_text(encoding="ascii").split())


def solve(prompt: str) -> str:
    """The right answer to `prompt`; ValueError where it is none of the three tasks."""
    if match := _ADD.fullmatch(prompt):
        return str(int(match[1]) + int(match[2]))
    if match := _WORD.fullmatch(prompt):
        task, word = match.groups()
        return word[::-1] if task == "reverse" else "".join(sorted(word))
    raise ValueError(f"not a prompt of the demo's tasks: {prompt!r}")


def exact(prompt: str, answer: str) -> bool:
    """Whether `answer` is right to the letter; ValueError where `prompt` is none of the three tasks."""
    return answer == solve(prompt)


def held_out(prompt: str) -> bool:
    """Whether the example is kept from training; ValueError where `prompt` is none of the three tasks."""
    if match := _ADD.fullmatch(prompt):
        # 17 + 58 in training would give away 58 + 17.
        low, high = sorted(map(int, match.groups()))
        return high > LARGEST_DIGIT and _hashed_out(f"{low} {high}")
    if match := _WORD.fullmatch(prompt):
        word = match[2]
        return _hashed_out(word) or word in _word_set()
    raise ValueError(f"not a prompt of the demo's tasks: {prompt!r}")


def training_examples(rng: Rng) -> Iterator[Example]:
    """Endless examples of the training side, the three tasks equally often, drawn with `rng`."""
    while True:
        task = rng.choice(tuple(TASKS))
        example = TASKS[task](rng)
        if not held_out(example.prompt):
            yield example


def holdout(task: str, count: int, seed: int = 0) -> list[Example]:
    """`count` different held-out examples of one task, the same ones for the same seed.

    The word tasks begin with the real words, in an order drawn from `seed`, and go on with held-out random letters.
    ValueError where the task has fewer held-out examples than `count`.
    """
    rng = Rng(f"holdout {task} {seed}")
    if task == "add":
        numbers = range(LARGEST_ADDEND + 1)
        everything = [_addition(a, b) for a in numbers for b in numbers]
        kept = [example for example in everything if held_out(example.prompt)]
        if count > len(kept):
            raise ValueError(f"only {len(kept)} additions are held out, {count} were asked for")
        return rng.sample(kept, count)
    examples = dict.fromkeys(_word_example(task, word) for word in rng.sample(words(), len(words())))
    while len(examples) < count:
        example = TASKS[task](rng)
        if held_out(example.prompt):
            examples.setdefault(example)
    return list(examples)[:count]


def mixed_holdout(count: int, seed: int = 0) -> list[Example]:
    """`count` different held-out examples, the tasks in turn, the same ones for the same seed."""
    share = -(-count // len(TASKS))
    columns = [holdout(task, share, seed) for task in TASKS]
    return [example for row in zip(*columns, strict=True) for example in row][:count]


def _addition(a: int, b: int) -> Example:
    prompt = f"{a} + {b} ="
    return Example("add", prompt, solve(prompt))


def _word_example(task: str, word: str) -> Example:
    prompt = f"{task} {word} ="
    return Example(task, prompt, solve(prompt))


def _addend(rng: Rng) -> int:
    # Drawn evenly, one sum in a hundred would be of single digits: too few to learn the table that people try first.
    return rng.randint(0, rng.choice((LARGEST_DIGIT, LARGEST_ADDEND, LARGEST_ADDEND)))


def _word(rng: Rng) -> str:
    # Words repeat letters more often than uniform draws do (banana): half of ours draw from a few letters only.
    alphabet = ascii_lowercase if rng.random() < 0.5 else rng.sample(ascii_lowercase, rng.randint(1, LONGEST_WORD))
    return "".join(rng.choices(alphabet, k=rng.randint(SHORTEST_WORD, LONGEST_WORD)))


TASKS: dict[str, Callable[[Rng], Example]] = {
    "add": lambda rng: _addition(_addend(rng), _addend(rng)),
    "reverse": lambda rng: _word_example("reverse", _word(rng)),
    "sort": lambda rng: _word_example("sort", _word(rng)),
}
"""Each task's name and how to draw one of its examples, from either side of the split."""


def _hashed_out(subject: str) -> bool:
    return int.from_bytes(sha256(subject.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


@cache
def _word_set() -> frozenset[str]:
    return frozenset(words())
