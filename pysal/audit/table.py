"""The columns of a shard: their types, how maps become what is stored, and the bytes of a Parquet file."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pysal.methods.traits import stores_drops

# Columns of every shard, in order; docs/auditing.md says what they hold. Metrics come after the first group, maps at the end.
IMAGE = {"id": pa.int64(), "path": pa.string(), "label": pa.int32(), "sha256": pa.string()}
FIGURES = {
    "predicted": pa.int32(),
    "predicted_probability": pa.float64(),
    "target": pa.int32(),
    "probability": pa.float64(),
    "score": pa.float64(),
    "residual": pa.float64(),
    "error": pa.float64(),
    "steps": pa.int32(),
    "standard_error": pa.float64(),
}
# Those that a model of classes has of every image.
OF_CLASSES = ("predicted", "predicted_probability", "target", "probability")
ERRORS = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
TIMINGS = pa.schema(
    [
        ("shard", pa.int32()),
        ("stage", pa.string()),
        ("images", pa.int32()),
        ("seconds", pa.float64()),
        ("cpu_seconds", pa.float64()),
        ("images_together", pa.int32()),
        ("started", pa.timestamp("us", "UTC")),
        ("host", pa.string()),
        ("process", pa.int64()),
    ]
)
FEW_VALUES = ("method", "fault", "predicted", "label", "target", "steps")
COMPRESSION = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}


def map_type(maps: str, signed: bool) -> pa.DataType:
    """Return the type of a stored map's values."""
    if maps == "float16":
        return pa.float16()
    return pa.int8() if signed else pa.uint8()


def quantised(map: NDArray[np.floating[Any]], maps: str, signed: bool) -> tuple[NDArray[Any], float]:
    """Return what is stored of a map, and the scale that turns it back into values: value = scale * stored.

    For float16 the scale is a power of two that brings the map's largest value to between a half and 1, so that neither
    large nor small maps leave float16's range and nothing is lost but the digits beyond its eleven. For uint8, or int8
    where maps have a sign, the largest value becomes 255, or 127 in size, and the error is at most half a step.

    Args:
        map: (h, w), finite.
        maps: "float16" or "uint8".
        signed: whether the method's maps have values below 0.
    """
    largest = float(np.abs(map).max(initial=0.0))
    if maps == "float16":
        scale = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
        return (map.astype(np.float64) / scale).astype(np.float16), scale
    steps, kind = (127, np.int8) if signed else (255, np.uint8)
    scale = largest / steps or 1.0
    return np.rint(map.astype(np.float64) / scale).clip(-steps if signed else 0, steps).astype(kind), scale


def schema(manifest: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of a job's shards."""
    fields = [pa.field(name, kind, nullable=name == "label") for name, kind in IMAGE.items()]
    fields.append(pa.field("method", pa.string(), nullable=False))
    fields += [pa.field(name, kind) for name, kind in FIGURES.items()]
    fields += [pa.field(name, pa.float64()) for name in manifest["metrics"]]
    fields.append(pa.field("fault", pa.string()))
    if manifest["maps"] != "none":
        fields.append(pa.field("map_scale", pa.float64()))
        for name, method in manifest["methods"].items():
            if method["map_shape"]:
                kind = map_type(manifest["maps"], method["signed"])
                fields.append(pa.field(f"map_{name}", pa.fixed_shape_tensor(kind, method["map_shape"])))
    if any(map(stores_drops, manifest["methods"])):
        fields.append(pa.field("drops", pa.list_(pa.float32())))
        if manifest["maps"] != "none" and manifest["boxes"] is None:
            fields.append(pa.field("segments", pa.fixed_shape_tensor(pa.uint16(), manifest["model"]["input_size"])))
    return pa.schema(fields)


def encode(schema: pa.Schema, groups: Sequence[Mapping[str, Sequence[Any]]]) -> bytes:
    """Return a Parquet file with one row group for each group of columns; columns that a group lacks are null.

    Tensor columns are sequences of arrays, None where there is none. The same rows give the same bytes.
    """
    buffer = io.BytesIO()
    tensors = {field.name: field.type.value_type for field in schema if isinstance(field.type, pa.FixedShapeTensorType)}
    # Parquet has no integers of 8 bits: it stores 32, of which the streams of the upper 24 are nothing but zeros; not so where
    # there is a sign, for which a dictionary of the 255 values is better. DuckDB cannot read split streams of float16.
    split = [name for name, kind in tensors.items() if pa.types.is_unsigned_integer(kind)]
    few = [name for name in FEW_VALUES if name in schema.names]
    few += [f"{name}.list.element" for name, kind in tensors.items() if pa.types.is_int8(kind)]
    plain = [name for name in schema.names if name not in tensors]
    nulls: dict[pa.DataType, pa.Array] = {}
    with pq.ParquetWriter(
        buffer,
        schema,
        use_dictionary=few,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split} or None,
        write_statistics=plain,
        **COMPRESSION,
    ) as writer:
        for group in groups:
            rows = len(group["id"])
            columns = []
            for field in schema:
                values = group.get(field.name)
                if isinstance(field.type, pa.FixedShapeTensorType):
                    if values is None:
                        if field.type not in nulls or len(nulls[field.type]) != rows:
                            nulls[field.type] = _tensors([None] * rows, field.type)
                        columns.append(nulls[field.type])
                    else:
                        columns.append(_tensors(values, field.type))
                else:
                    columns.append(pa.nulls(rows, field.type) if values is None else pa.array(values, field.type))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(rows, 1))
    return buffer.getvalue()


def _tensors(values: Sequence[NDArray[Any] | None], kind: pa.FixedShapeTensorType) -> pa.Array:
    empty = np.zeros(kind.shape, dtype=kind.value_type.to_pandas_dtype())
    flat = np.concatenate([empty.ravel()[:0], *(np.ravel(empty if value is None else value) for value in values)])
    missing = pa.array([value is None for value in values], pa.bool_())
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind.storage_type, mask=missing)
    return pa.ExtensionArray.from_storage(kind, storage)


def encode_records(schema: pa.Schema, records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a Parquet file of records."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records), schema=schema), buffer, **COMPRESSION)
    return buffer.getvalue()
