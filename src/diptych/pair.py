"""`Pair`: an image and a text that belong together, as it is written into shards and read from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("image_url", pa.string()),
        pa.field("page_url", pa.string()),
        pa.field("details", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of `SCHEMA`.

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
    details: Mapping[str, str] = field(default_factory=dict)
    """Provenance: source, style, licence, label, ..."""


def to_batch(pairs: Iterable[Pair]) -> pa.RecordBatch:
    """Pack pairs into one Arrow record batch."""
    rows = [
        {
            "key": pair.key,
            "caption": pair.caption,
            "image": pair.image,
            "image_url": pair.image_url,
            "page_url": pair.page_url,
            "details": list(pair.details.items()),
        }
        for pair in pairs
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterable[Pair]:
    """View the rows of a record batch as pairs."""
    for row in batch.to_pylist():
        yield Pair(**{**row, "details": dict(row["details"])})
