"""Labels in parquet files: sidecars and tables of captions."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from cat_fast.data.images.label_fields import LABELS

_BATCH = 1024


def label_columns(file: Path | IO[bytes]) -> list[str]:
    """Return the names of all columns of a parquet file.

    Raises:
        OSError: it cannot be read, or is not a parquet file.
    """
    try:
        return list(pyarrow.parquet.read_schema(file).names)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def label_rows(file: Path | IO[bytes], keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file with its columns of labels and `keys`; one batch is in memory.

    Raises:
        OSError: it cannot be read, or is not a parquet file.
    """
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            existing = table.schema_arrow.names
            columns = [name for name in (*keys, *LABELS) if name in existing]
            for batch in table.iter_batches(_BATCH, columns=columns):
                yield from _rows(batch)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch; text that is not UTF-8 remains bytes, which no label accepts."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
            return [_value(item) for item in scalar.values]
        return scalar.as_buffer().to_pybytes()
