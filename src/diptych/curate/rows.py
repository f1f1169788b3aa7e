"""What travels between the stages of curation: Arrow rows, and the reason of each row that is dropped.

A stage is a function from record batches to record batches. It gives back every row it was given, in order, with its
own columns and a last column `reason`: null for a row that stays, one short word for a row that does not. It reads no
clock and no random generator, so it gives the same rows wherever and however often it runs.

    CANDIDATES  key, caption, image (null), image_url, page_url, details        from web pages; the filters keep it
    MATCHED     ... queries                                                     the ids of the queries in the caption
    BALANCED    ... query, draw                                                 what admitted the pair
    FETCHED     the same, with image filled in
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import xxhash

from diptych.errors import UsageError
from diptych.pair import SCHEMA
from diptych.stage.folder import REASON, reading

CANDIDATES = SCHEMA
MATCHED = CANDIDATES.append(pa.field("queries", pa.list_(pa.int32())))
"""`queries`: sorted numbers in the list of queries."""
BALANCED = MATCHED.append(pa.field("query", pa.int32())).append(pa.field("draw", pa.float64()))
"""`query` is what the pair is charged to, or whose draw admitted it; `draw` is that draw, in [0, 1)."""
FETCHED = BALANCED
"""With pictures."""


def read_queries(path: Path) -> pa.Table:
    """A list of queries: `id`, which counts from 0, and `text`; UsageError if it is none."""
    with reading(path) as file:
        schema = file.schema_arrow
        if not {"id", "text"} <= {*schema.names} or not pa.types.is_string(schema.field("text").type):
            raise UsageError(f"{path} is no list of queries, which has the columns id and text; it has {schema.names}")
        table = file.read(["id", "text"]).sort_by("id")
    if table["id"].to_pylist() != list(range(len(table))) or table["text"].null_count:
        raise UsageError(f"ids in {path} are not 0, 1, 2, ... with a text each; write the list again")
    return table


def outcome(schema: pa.Schema) -> pa.Schema:
    """What a stage yields whose kept rows have this schema."""
    return schema.append(REASON)


def key_of(image_url: str, caption: str) -> str:
    """The key of a candidate: 32 hex digits that depend on the picture's address and the text alone."""
    return xxhash.xxh3_128_hexdigest(f"{image_url}\0{caption}".encode())


def with_reason(batch: pa.RecordBatch, reasons: Sequence[str | None]) -> pa.RecordBatch:
    """Say for each row why it is dropped, or None; a row that has a reason already keeps it."""
    column = pa.array(reasons, pa.string())
    if "reason" not in batch.schema.names:
        return batch.append_column(REASON, column)
    place = batch.schema.get_field_index("reason")
    return batch.set_column(place, REASON, batch.column(place).fill_null(column))


def draw(seed: int, *parts: object) -> float:
    """A number in [0, 1) that depends on its arguments alone. For whole columns see `balance.policies.pair_draws`."""
    text = "\0".join(map(str, (seed, *parts)))
    return (xxhash.xxh3_64_intdigest(text.encode()) >> 11) / 2.0**53
