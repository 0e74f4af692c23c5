import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimind.inference.transfer import side_by_side


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), dtype=st.sampled_from([np.int32, np.int64]))
def test_arrays_in_one_begin_at_aligned_places(lengths, dtype):
    arrays = [np.arange(n, dtype=dtype) + 100 * i for i, n in enumerate(lengths)]
    whole, places = side_by_side(arrays)
    assert whole.dtype == dtype
    for array, place in zip(arrays, places, strict=True):
        assert np.array_equal(whole[place], array)
        assert place.start * whole.itemsize % 64 == 0
