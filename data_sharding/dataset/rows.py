"""Read the rows of a Parquet file that anybody may have changed: the ledger or the fingerprints of a dataset.

A Parquet file of a few kB can unpack to gigabytes, because a text that every row repeats is stored only once. To limit
the memory, this module first checks the types of the columns, decodes each different text only once, and computes the
size of the rows before it makes the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_unpacked

BATCH = 256
"""Number of rows that are decoded together."""
TEXT_BYTES = 56
"""Number of bytes that Python needs for a text in addition to its characters."""


class Rows:
    """The rows of a Parquet file.

    Parameters
    ----------
    stream : binary file
        The opened file.
    size : int
        Size of the file in bytes.
    where : str
        Path of the file, for error messages.
    schema : pyarrow.Schema
        Names and types of the columns that may be read. Columns of the file that are not in `schema` are ignored.

    Raises
    ------
    RequestError
        If a column has another type than in `schema`, or if the file unpacks to far more than its own size.
    pyarrow.ArrowException, OSError
        If the file is damaged.
    """

    def __init__(self, stream: Any, size: int, where: str, schema: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._size, self._where = size, where
        # Arrow's own threads are not used: on a busy machine they have crashed the Python interpreter when it exited.
        options: dict[str, Any] = {"pre_buffer": False, "memory_map": False}
        about = pq.ParquetFile(stream, **options)
        self.metadata = about.metadata
        check_unpacked([16 * self.metadata.num_rows], size, where)
        found = about.schema_arrow
        if len({*found.names}) < len(found.names):
            raise RequestError(f"{where}: damaged (two columns have the same name); get the file again from its source")
        self.schema = pa.schema([field for field in schema if field.name in found.names])
        for field in self.schema:
            if not _same_type(found.field(field.name).type, field.type):
                raise RequestError(
                    f"{where}: column {field.name} has the type {show(str(found.field(field.name).type))}, not "
                    f"{field.type}; get the file again from its source"
                )
        leaves = [self.metadata.schema.column(i) for i in range(self.metadata.num_columns)]
        self._texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        self._file = pq.ParquetFile(stream, read_dictionary=self._texts, **options)

    @property
    def names(self) -> list[str]:
        """Names of the columns that can be read, in the order of `schema`."""
        return list(self.schema.names)

    def group_sizes(self) -> list[int]:
        """Return the number of rows of each row group."""
        return [self.metadata.row_group(number).num_rows for number in range(self.metadata.num_row_groups)]

    def iterate(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Read rows in small parts.

        Parameters
        ----------
        columns : sequence of str
            Columns to read.
        groups : sequence of int, optional
            Numbers of the row groups to read; by default all.

        Yields
        ------
        dict
            Dictionary from the name of each column to the value in the row.

        Raises
        ------
        RequestError
            If the rows take far more memory than the file.
        """
        import pyarrow as pa

        numbers = range(self.metadata.num_row_groups) if groups is None else groups
        indices = [
            i
            for i in range(self.metadata.num_columns)
            if self.metadata.schema.column(i).path.split(".")[0] in set(columns)
        ]
        stated = (self.metadata.row_group(n).column(i).total_uncompressed_size for n in numbers for i in indices)
        check_unpacked(stated, self._size, self._where)
        wanted = pa.schema([self.schema.field(name) for name in columns])
        total = 0
        for part in self._file.iter_batches(BATCH, row_groups=[*numbers], columns=[*columns], use_threads=False):
            total += sum(map(_memory, part.columns))
            check_unpacked([total], self._size, self._where)
            yield from part.select(columns).cast(wanted).to_pylist()


def _same_type(found: Any, wanted: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(found):
        found = found.value_type
    if kinds.is_list(wanted):
        is_list = kinds.is_list(found) or kinds.is_large_list(found)
        return is_list and _same_type(found.value_type, wanted.value_type)
    if kinds.is_string(wanted):
        return kinds.is_string(found) or kinds.is_large_string(found)
    return found == wanted


def _memory(array: Any) -> int:
    """Return the approximate number of bytes that an array's values need as Python objects."""
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    if kinds.is_list(array.type) or kinds.is_large_list(array.type):
        return 8 * len(array) + _memory(array.flatten())
    if kinds.is_dictionary(array.type):
        lengths: Any = compute.binary_length(array.dictionary)
        total = compute.sum(lengths.take(array.indices.drop_null()).cast("int64")).as_py() or 0
        return total + TEXT_BYTES * len(array)
    return max(array.nbytes, 8 * len(array))
