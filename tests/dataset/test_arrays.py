import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfopt.dataset.arrays import as_array
from tfopt.errors import InputError

NUMBERS = hnp.arrays(
    st.sampled_from(["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64"]),
    hnp.array_shapes(min_dims=1, max_dims=2, max_side=5),
)


class TestNumbers:
    @settings(deadline=None)
    @given(NUMBERS)
    def test_lists_hold_what_the_array_holds(self, array):
        found = as_array(array.tolist(), "input 'x'")
        np.testing.assert_array_equal(found, array)
        assert (found.dtype.kind == "f") == (array.dtype.kind == "f" or not array.size)

    @settings(deadline=None)
    @given(NUMBERS)
    def test_pandas_keeps_values_and_dtypes(self, array):
        value = pd.Series(array) if array.ndim == 1 else pd.DataFrame(array)
        value.index = [7] * len(array)  # rows stay in order, whatever the index
        found = as_array(value, "input 'x'")
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype

    @pytest.mark.parametrize("dtype", ["Int8", "Int64", "UInt16", "Float32", "boolean"])
    def test_missing_values_of_pandas_are_nan(self, dtype):
        found = as_array(pd.Series([1, None, 0], dtype=dtype), "input 'x'")
        assert found.dtype.kind == "f"
        assert (found[0], found[2]) == (1, 0)
        assert math.isnan(found[1])
        whole = as_array(pd.Series([1, 0], dtype=dtype), "input 'x'")
        assert whole.dtype.kind == np.dtype(dtype.lower().replace("boolean", "bool")).kind

    def test_columns_of_several_dtypes(self):
        frame = pd.DataFrame({"age": np.array([3, 4], np.int64), "price": np.array([0.5, 2.0])})
        assert as_array(frame, "input 'x'").tolist() == [[3.0, 0.5], [4.0, 2.0]]

    def test_categories_are_their_values(self):
        assert as_array(pd.Series([5, 9, 5], dtype="category"), "labels").tolist() == [5, 9, 5]
        assert as_array(pd.Series(["b", "a"], dtype="category"), "labels").tolist() == ["b", "a"]

    def test_rows_in_an_array_of_objects(self):
        rows = np.empty(2, object)
        rows[:] = [np.array([1, 2]), np.array([3, 4])]
        assert as_array(rows, "input 'x'").tolist() == [[1, 2], [3, 4]]
        assert as_array(pd.Series(list(rows)), "input 'x'").tolist() == [[1, 2], [3, 4]]

    def test_tensors(self):
        import tensorflow as tf

        found = as_array([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], "input 'x'")
        np.testing.assert_array_equal(found, [[1, 2], [3, 4]])


class TestText:
    @pytest.mark.parametrize(
        "value",
        [["a", "häß"], np.array(["a", "häß"]), pd.Series(["a", "häß"]),
         pd.Series(["a", "häß"], dtype="string")],
    )  # fmt: skip
    def test_is_kept(self, value):
        assert list(as_array(value, "input 'x'")) == ["a", "häß"]

    def test_zero_bytes_at_the_end_are_kept(self):
        assert list(as_array([b"a\0", b"b"], "input 'x'")) == [b"a\0", b"b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2], [3]], "is a list that is no array.*one row an example"),
        ([np.zeros(2), np.zeros(3)], "is a list that is no array"),
        (None, "of type NoneType"),
        ({"a": 1}, "of type dict"),
        (iter([1]), "of type list_iterator"),
        (pd.Series(["a", None]), "1 missing values; fill them"),
        (pd.Series(pd.to_datetime(["2024-01-01"])), "dates or times"),
        (pd.DataFrame({"a": [1], "b": ["x"]}), r"numbers and text \(b\)"),
        (np.array([2**70], object), "beyond 64 bits"),
        (np.ma.masked_equal([1, 2], 2), "masked values"),
        (np.array([(1, 2.0)], [("a", int), ("b", float)]), "structured array"),
        (pd.Series([[1, 2], [3]]), "rows of unequal shapes"),
        (np.array([print], object), "holds builtin_function_or_method"),
    ],
)  # fmt: skip
def test_refused(value, message):
    with pytest.raises(InputError, match=f"^The input 'x' .*{message}|^The column .*{message}"):
        as_array(value, "input 'x'")


def test_ragged_and_sparse_tensors_are_refused():
    import tensorflow as tf

    with pytest.raises(InputError, match=r"RaggedTensor; call to_tensor\(\)"):
        as_array(tf.ragged.constant([[1], [2, 3]]), "input 'x'")
    with pytest.raises(InputError, match=r"SparseTensor; call tf.sparse.to_dense"):
        as_array(tf.sparse.from_dense([[1, 0]]), "input 'x'")
    with pytest.raises(InputError, match="DatasetV2; pass it alone"):
        as_array(tf.data.Dataset.range(3), "input 'x'")
