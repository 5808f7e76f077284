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
