"""Random kills of runs: see tests/kills.py."""

import pytest

from tests import kills


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.PAPERS)
def test_nothing_is_lost(name, tmp_path):
    """13 kills of each of four papers, 52 in all."""
    kills.check(name, tmp_path, 13)
