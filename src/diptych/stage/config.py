"""Where the tasks of a stage run."""

from dataclasses import dataclass
from typing import Literal

from diptych.errors import UsageError

EngineKind = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where the tasks of a stage run; it does not change what comes out."""

    engine: EngineKind = "local"
    """local: processes of this machine. ray: a Ray cluster ($RAY_ADDRESS, or one started here) that sees the folder."""
    processes: int | None = None
    """Tasks at once; by default one per core of this machine or of the cluster."""
    redo: bool = False
    """Make a folder anew that was begun with other settings or inputs."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UsageError(f"processes {self.processes} must be 1 or more; leave it out for one per core")
