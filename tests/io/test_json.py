"""JSON of registries and histories: everything comes back as it was, and nothing else is accepted."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cellweave.io import _json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = st.one_of(
    *(arrays(dtype, st.integers(0, 5)) for dtype in (np.int64, np.int8, np.uint16, bool, np.float64, np.float32)),
    arrays(object, st.integers(0, 5), elements=st.text()),
    arrays("U6", st.integers(0, 5)),
)


def _round_trip(value):
    return _json.loads(_json.dumps(value))


@given(PLAIN)
def test_plain_values(value):
    """Protects setup and constructor arguments: any nesting of plain values, any text."""
    assert _round_trip(value) == value


@given(ARRAYS)
def test_arrays(array):
    """Protects categories and gene names: values and dtype of any one-dimensional array."""
    back = _round_trip({"a": array})["a"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("values", [[1, 2], [True, False], [0.1, np.nan, np.inf], ["a", "b\n/é"]])
def test_frames(values):
    """Protects the training history: values, columns, index and its name."""
    frame = pd.DataFrame({"loss": values}, index=pd.RangeIndex(3, 3 + len(values), name="epoch"))
    pd.testing.assert_frame_equal(_round_trip(frame), frame, check_index_type=False)


def test_keys_that_are_no_strings():
    """Protects dictionaries keyed by numbers: JSON would turn the keys into strings."""
    value = {1: "a", 2.5: {"b": 3}}
    assert _round_trip(value) == value


def test_numpy_scalars_become_plain():
    """Protects constructor arguments taken from arrays: numpy numbers come back as python numbers."""
    assert _round_trip({"n": np.int64(3), "x": np.float32(0.5), "b": np.bool_(True)}) == {"n": 3, "x": 0.5, "b": True}


def test_same_value_same_bytes():
    """Protects comparisons of saved models: the encoding has no hidden state."""
    value = {"b": np.arange(3), "a": [1, {"c": "é"}]}
    assert _json.dumps(value) == _json.dumps(value)
    assert json.loads(_json.dumps(value))["a"] == [1, {"c": "é"}]


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, b"bytes", 1j])
def test_other_types_are_refused(value):
    """Protects safety: what JSON cannot hold is an error that shows the value, never a pickle."""
    with pytest.raises(TypeError, match=f"cannot save a value of type {type(value).__name__}"):
        _json.dumps({"x": value})
