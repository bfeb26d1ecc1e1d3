"""Philox against its authors' vectors, and against Triton's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kernels.philox import philox, uniform

Words = tuple[int, ...]

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, output.
VECTORS: list[tuple[Words, Words, Words]] = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values: Words) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_vectors(counter: Words, key: Words, expected: Words) -> None:
    output = philox(words(key), words(counter))  # type: ignore[arg-type]
    assert tuple(word.item() for word in output) == expected


def test_uniform_is_the_first_word_of_seed_and_position() -> None:
    """A negative int64 stands for the unsigned seed with the same bits."""
    seed = 0x299F31D0A4093822
    for signed in (seed, -(2**64 - seed) if seed >= 2**63 else seed):
        (draw,) = uniform(torch.tensor([signed]), torch.tensor([5]), torch.tensor([2])).tolist()
        word = philox(words((0xA4093822, 0x299F31D0)), words((5, 0, 2, 0)))[0].item()  # type: ignore[arg-type]
        assert draw == (word >> 8) / 2**24
    high = uniform(torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))
    same = philox(words((0xFFFFFFFF, 0xFFFFFFFF)), words((0, 0, 0, 0)))[0]  # type: ignore[arg-type]
    assert high.item() == (same.item() >> 8) / 2**24


def test_draws_do_not_depend_on_their_batch() -> None:
    seeds, positions = torch.arange(64) * 977, torch.arange(64)
    indices = torch.arange(64) % 3
    together = uniform(seeds, positions, indices)
    alone = torch.cat([uniform(seeds[i : i + 1], positions[i : i + 1], indices[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)


def test_draws_are_uniform() -> None:
    """Chi-square over 64 bins, along positions of one seed and along seeds of one position."""
    count, bins = 16384, 64
    for seeds, positions in (
        (torch.full((count,), 11), torch.arange(count)),
        (torch.arange(count), torch.full((count,), 11)),
    ):
        draws = uniform(seeds, positions, torch.zeros(count, dtype=torch.int64))
        assert draws.min() >= 0.0
        assert draws.max() < 1.0
        observed = torch.histc(draws, bins, 0.0, 1.0)
        chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum().item()
        assert chi_square < 117.0  # 63 degrees of freedom, p = 0.00005


KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def draw(out, seed, n: tl.constexpr):
    position = tl.arange(0, n)
    tl.store(out + position, tl.randint(seed, position))

from kernels.philox import philox
for seed in (0, 7, 0x123456789ABCDEF):
    out = torch.zeros(64, dtype=torch.int32)
    draw[(1,)](out, seed, 64)
    low, high = torch.full((64,), seed & 0xFFFFFFFF), torch.full((64,), seed >> 32)
    zero = torch.zeros(64, dtype=torch.int64)
    words = philox((low, high), (torch.arange(64), zero, zero, zero))[0]
    assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, words), seed
"""


@pytest.mark.slow
def test_philox_gives_the_bits_of_triton(tmp_path: object) -> None:
    """In another process, where Triton's interpreter can be on."""
    pytest.importorskip("triton")
    script = f"{tmp_path}/draw.py"  # Triton reads the kernel's source from its file
    with open(script, "w", encoding="utf-8") as file:
        file.write(KERNEL)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
