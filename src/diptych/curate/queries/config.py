"""Settings of the list of queries."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """What a list of queries is made of; each source is left out when it is not named."""

    out: Path
    """Folder to write: queries.parquet, queries.tsv, report.json."""
    corpus: tuple[str, ...] = ()
    """Texts to count words in: dumps of a wiki (.xml), lines (.txt), JSON lines (.jsonl) or Parquet with `caption` or
    `text`; packed (.bz2, .gz, .xz) or not, at paths or URLs, with * for several."""
    pageviews: tuple[str, ...] = ()
    """Hourly files of page views (`en Title 12 0`), packed or not."""
    wordnet: str | None = None
    """WordNet's data files: a folder, a .zip or a .tar.gz that holds data.noun, data.verb, data.adj, data.adv."""
    lists: tuple[str, ...] = ()
    """Lists that exist: a query a line (of .tsv the first column), or a JSON list."""
    min_word_count: int = 100
    """Times a word must be seen; 100 in the paper."""
    min_bigram_count: int = 100
    """Times a pair of neighbouring words must be seen."""
    min_pmi: float = 10.0
    """Bits of pointwise mutual information that a pair of neighbouring words must have."""
    min_views: int = 70
    """Views, over all files, that an article must have for its title."""
    min_views_a_file: int = 1
    """Views below this in one file are not counted."""
    project: str = "en"
    """Project code of the page views."""
    max_characters: int = 256
    """Longer queries are left out."""
    memory: int = 2_000_000
    """Distinct words or titles that are counted in memory before they go to the disk."""
    processes: int = 0
    """Files of the corpus that are read at once; 0 reads in this process."""

    def __post_init__(self) -> None:
        if not (self.corpus or self.pageviews or self.wordnet or self.lists):
            raise UsageError("no source of queries is named; name --corpus, --pageviews, --wordnet or --lists")
        for name in ("min_word_count", "min_bigram_count", "min_views", "min_views_a_file", "max_characters", "memory"):
            if vars(self)[name] < 1:
                raise UsageError(f"{name} is {vars(self)[name]}; it must be 1 or more")
