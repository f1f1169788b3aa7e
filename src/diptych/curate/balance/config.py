"""How queries are listed, matched and balanced: frozen values, nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError

Rule = Literal["includes", "strict_metaclip"]
Policy = Literal["cap", "metaclip", "assign"]


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Which queries a text contains."""

    pairs: Path
    """Folder of candidates: what the stage before wrote."""
    queries: Path
    """The list: queries.parquet with the columns id and text."""
    out: Path
    """Folder to write."""
    rule: Rule = "includes"
    """How texts are compared: words without case and punctuation, or to the letter of MetaCLIP."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which matched pairs stay."""

    pairs: Path
    """Folder of matched pairs."""
    queries: Path
    """The list they were matched with: queries.parquet."""
    out: Path
    """Folder to write."""
    policy: Policy = "cap"
    """cap: no query keeps more than the limit. metaclip: each is kept with a chance of limit / count for each of its
    queries. assign: each pair counts for its rarest query only, and each query keeps up to the limit of those."""
    limit: int = 20_000
    """Pairs a query; 20,000 in the paper."""
    seed: int = 0
    """Seed of the random draws."""
    compare: bool = True
    """Also count what the other two policies would keep."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"limit is {self.limit}; allowed: 1 or more; the paper uses 20000")
