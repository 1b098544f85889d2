"""The table of mutations names lines and tests that are there."""

from collections import Counter

import pytest

from jaxpapers import papers
from tests.mutations import MUTATIONS, ROOT, text


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.paper}-{m.after}")
def test_lines_and_tests_exist(mutation):
    assert mutation.before in text(mutation)
    assert mutation.before != mutation.after
    for test in mutation.tests:
        path, *names = test.split("::")
        source = (ROOT / path).read_text()
        assert all(f"def {name.split('[')[0]}(" in source for name in names)


def test_every_paper_has_three():
    counts = Counter(mutation.paper for mutation in MUTATIONS)
    assert not [name for name in papers.NAMES if counts[name] < 3]
