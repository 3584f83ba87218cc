"""Which rows run together, against a brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin import GenerationOptions
from paddlemix_qwenvl_plugin.batch.job import Planned, make_batches

OPTIONS = [GenerationOptions(), GenerationOptions(seed=1), GenerationOptions(max_new_tokens=2)]

planned_rows = st.lists(
    st.tuples(
        st.integers(1, 300),
        st.sampled_from(OPTIONS),
        st.booleans(),
        st.lists(st.integers(0, 3), max_size=2).map(tuple),
    ),
    max_size=40,
).map(lambda rows: [Planned(index, *row) for index, row in enumerate(rows)])


def goes_before(a, b):
    """Whether row a must run before row b of the same options and form."""
    if a.n_tokens // 64 != b.n_tokens // 64:
        return a.n_tokens > b.n_tokens
    if a.pictures != b.pictures:
        return a.pictures < b.pictures
    if a.n_tokens != b.n_tokens:
        return a.n_tokens > b.n_tokens
    return a.index < b.index


@given(planned_rows, st.integers(1, 9))
def test_against_brute_force(rows, size):
    batches = make_batches(rows, size)
    assert sorted(row.index for batch in batches for row in batch) == list(range(len(rows)))
    groups = {}
    for batch in batches:
        assert 1 <= len(batch) <= size
        ((options, chat),) = {(row.options, row.chat) for row in batch}
        groups.setdefault((options, chat), []).append(batch)
    # Groups one after the other, in the order of the input.
    assert list(groups) == list(dict.fromkeys((row.options, row.chat) for row in rows))
    assert [batch for group in groups.values() for batch in group] == batches
    for group in groups.values():
        assert all(len(batch) == size for batch in group[:-1])
        order = [row for batch in group for row in batch]
        for place, row in enumerate(order):
            assert place == sum(goes_before(other, row) for other in order if other is not row)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_text_rows_are_sorted_by_length(lengths):
    batches = make_batches([Planned(i, n, OPTIONS[0], False, ()) for i, n in enumerate(lengths)], 4)
    assert [row.n_tokens for batch in batches for row in batch] == sorted(lengths, reverse=True)
