import itertools

import pytest

from nm_sparsity.core import NMPattern, SparsityError


def test_parses_and_prints() -> None:
    pattern = NMPattern.parse("2:4")
    assert (pattern.n, pattern.m, pattern.density, str(pattern)) == (2, 4, 0.5, "2:4")
    assert NMPattern.parse(pattern) is pattern


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2-4", "2:4:8", "", "2:", "-1:4", "a:b", "2.0:4", " 2:4"])
def test_refuses_what_is_not_n_of_m_and_shows_the_way(text: str) -> None:
    with pytest.raises(SparsityError, match=r'write e\.g\. "2:4"'):
        NMPattern.parse(text)


@pytest.mark.parametrize("m", range(2, 7))
def test_a_pattern_implies_another_exactly_if_every_mask_of_it_does(m: int) -> None:
    for n, (k, size) in itertools.product(range(1, m), [(1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (2, 6)]):
        masks = [mask for mask in itertools.product((0, 1), repeat=m) if sum(mask) == n]
        worst = 0
        for start in range(0, m * size, size):
            window = range(start, start + size)
            groups = {i // m for i in window}
            # Each group can have its worst mask, whatever the others have.
            worst = max(
                worst, sum(max(sum(mask[i % m] for i in window if i // m == g) for mask in masks) for g in groups)
            )
        assert NMPattern(n, m).implies(NMPattern(k, size)) == (worst <= k)


@pytest.mark.parametrize(("pattern", "runs"), [("2:4", 1), ("1:4", 1), ("2:8", 1), ("1:16", 1), ("1:2", 1), ("4:8", 0)])
def test_what_runs_as_2_4(pattern: str, runs: int) -> None:
    assert NMPattern.parse(pattern).implies(NMPattern(2, 4)) == bool(runs)
