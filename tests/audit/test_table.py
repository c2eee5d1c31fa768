"""How maps become what is stored: within half a step, whatever their range; and the same rows give the same bytes."""

import io

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pysal.audit.table import encode, quantised

MAPS = arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))


@given(MAPS)
def test_float16_keeps_eleven_digits_whatever_the_range(map) -> None:
    stored, scale = quantised(map, "float16", True)
    largest = float(np.abs(map).max())
    assert stored.dtype == np.float16
    assert np.isfinite(stored).all()
    # values of at most 1: half a unit in the last of eleven digits of each, or of the smallest float16
    values = map.astype(np.float64)
    assert (np.abs(stored.astype(np.float64) * scale - values) <= np.maximum(np.abs(values) * 2.0**-11, scale * 2.0**-25)).all()
    assert largest <= scale <= 2 * largest or largest == 0


@given(MAPS)
def test_signed_maps_have_127_steps_each_way(map) -> None:
    stored, scale = quantised(map, "uint8", True)
    assert stored.dtype == np.int8
    values = map.astype(np.float64)
    assert (np.abs(stored.astype(np.float64) * scale - values) <= scale / 2 * (1 + 1e-9)).all()
    assert np.abs(stored.astype(int)).max() == (127 if np.abs(map).max() > 0 else 0)


@given(MAPS)
def test_maps_without_a_sign_have_255_steps(map) -> None:
    map = np.abs(map)
    stored, scale = quantised(map, "uint8", False)
    assert stored.dtype == np.uint8
    values = map.astype(np.float64)
    assert (np.abs(stored.astype(np.float64) * scale - values) <= scale / 2 * (1 + 1e-9)).all()
    assert stored.max() == (255 if map.max() > 0 else 0)


@pytest.mark.parametrize("kind", [pa.float16(), pa.uint8(), pa.int8(), pa.uint16()], ids=str)
def test_tensors_come_back_and_so_does_their_absence(tmp_path, kind) -> None:
    schema = pa.schema([("id", pa.int64()), ("map", pa.fixed_shape_tensor(kind, [2, 3])), ("drops", pa.list_(pa.float32()))])
    values = [np.arange(6).reshape(2, 3).astype(kind.to_pandas_dtype()) + n for n in range(3)]
    content = encode(schema, [{"id": [0, 1, 2], "map": [values[0], None, values[2]]}, {"id": [3], "drops": [[1.5]]}])
    table = pq.read_table(io.BytesIO(content))
    assert table.schema.equals(schema)
    found = table["map"].to_pylist()
    assert [None if map is None else list(map) for map in found] == [
        values[0].ravel().tolist(), None, values[2].ravel().tolist(), None,
    ]  # fmt: skip
    assert table["drops"].to_pylist() == [None, None, None, [1.5]]
    assert content == encode(schema, [{"id": [0, 1, 2], "map": [values[0], None, values[2]]}, {"id": [3], "drops": [[1.5]]}])
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    assert metadata.num_row_groups == 2
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert ("BYTE_STREAM_SPLIT" in metadata.row_group(0).column(1).encodings) == pa.types.is_unsigned_integer(kind)
    path = tmp_path / "shard.parquet"
    path.write_bytes(content)
    expected = [None if map is None else [float(value) for value in map] for map in found]
    assert [row[0] for row in duckdb.sql(f"select map::float[] from '{path}' order by id").fetchall()] == expected


def test_no_rows_are_a_file_with_the_columns() -> None:
    schema = pa.schema([("id", pa.int64()), ("map", pa.fixed_shape_tensor(pa.uint8(), [2, 3]))])
    assert pq.read_table(io.BytesIO(encode(schema, []))).schema.equals(schema)
