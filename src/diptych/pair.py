"""`Pair`: an image and a text that belong together, as it is written into shards and read from them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from diptych import files

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("image_url", pa.string()),
        pa.field("page_url", pa.string()),
        pa.field("details", pa.string(), nullable=False),
    ]
)
"""`details` is a JSON object as text, here and in the index of a shard."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of `SCHEMA`: `Pair(key="0001", caption="a red dot", image=Path("dot.jpg").read_bytes())`.

    Before it is fetched, `image_url` is known and `image` is not.
    """

    key: str
    """Unique in its dataset; names the sample in shards and reports. Without dots or slashes once it is in a shard."""
    caption: str
    """The text, as found."""
    image: bytes | None = None
    """The encoded picture (JPEG, PNG, ...)."""
    image_url: str | None = None
    """Where the picture is."""
    page_url: str | None = None
    """The page it was found on."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, as JSON has it: `label`, `captions` (all, if there are several), source, licence, ..."""


def to_batch(pairs: Iterable[Pair]) -> pa.RecordBatch:
    """Pack pairs into one Arrow record batch."""
    rows = [
        {
            "key": pair.key,
            "caption": pair.caption,
            "image": pair.image,
            "image_url": pair.image_url,
            "page_url": pair.page_url,
            "details": format_details(pair.details),
        }
        for pair in pairs
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterable[Pair]:
    """View the rows of a record batch as pairs."""
    for row in batch.to_pylist():
        yield Pair(**{**row, "details": files.parse_json(row["details"])})


def format_details(details: Mapping[str, Any]) -> str:
    """Details as JSON; TypeError or ValueError for what JSON has no word for."""
    return json.dumps(dict(details), ensure_ascii=False, allow_nan=False)
