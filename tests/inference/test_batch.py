import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimind.inference.batch import concatenate_aligned


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), dtype=st.sampled_from([np.int32, np.int64]))
def test_concatenated_arrays_begin_at_aligned_offsets(lengths, dtype):
    arrays = [np.arange(n, dtype=dtype) + 100 * i for i, n in enumerate(lengths)]
    joined, places = concatenate_aligned(arrays)
    assert joined.dtype == dtype
    for array, place in zip(arrays, places, strict=True):
        assert np.array_equal(joined[place], array)
        assert place.start * joined.itemsize % 64 == 0
