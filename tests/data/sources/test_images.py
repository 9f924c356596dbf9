"""The split that holds images out, and splits without their bad images."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from falcon_fast.data.sources.images import ImageArray, Split, held_out


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.booleans())
def test_a_tenth_is_held_out_and_every_label_gives_its_share(values: list[int], labelled: bool) -> None:
    labels = np.array(values, np.int64) if labelled else None
    n = len(values)
    kept, out = held_out(labels, n, 0.1)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(n))
    assert kept.tolist() == sorted(kept.tolist()) and out.tolist() == sorted(out.tolist())
    assert len(out) == max(1, round(n / 10)) and len(kept) >= 1
    if labels is not None:
        for label, size in Counter(values).items():
            given_up = int((labels[out] == label).sum())
            assert size // 10 <= given_up <= size // 10 + 1
    again = held_out(labels, n, 0.1)
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], out)


def test_the_larger_remainders_give_first_and_lonely_images_last() -> None:
    labels = np.repeat(np.arange(4), [9, 5, 5, 1])
    _, out = held_out(labels, 20, 0.1)  # two of: .9, .5, .5, .1
    assert sorted(labels[out].tolist()) in ([0, 1], [0, 2])
    labels = np.repeat(np.arange(6), [10, 1, 1, 1, 1, 1])
    _, out = held_out(labels, 15, 0.1)
    assert labels[out].tolist() == [0, 0]


def test_the_held_out_images_are_drawn_not_the_last() -> None:
    _, out = held_out(None, 1000, 0.1)
    assert out[0] < 100 < 900 < out[-1] and 400 < out.mean() < 600


def test_a_split_without_its_bad_images_keeps_the_others_in_order() -> None:
    whole = Split(ImageArray(np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)), np.array([4, 3, 2, 1, 0]))
    assert whole.without({}) is whole
    rest = whole.without([3, 0])
    assert rest.labels is not None and rest.labels.tolist() == [3, 2, 0]
    assert [rest.images.name(i) for i in range(3)] == ["image 1", "image 2", "image 4"]
    for i, index in enumerate((1, 2, 4)):
        assert np.array_equal(np.asarray(rest.images.image(i)), np.asarray(whole.images.image(index)))
    assert Split(whole.images, None).without([1]).labels is None
