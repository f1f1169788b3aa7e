"""Where a dataset lies on this machine, and how it gets there.

A dataset is looked for in the data folder, by its id or by the name of its repository. What is not there is fetched if
that is asked for: from the Hugging Face hub (its cache, tokens and offline mode are huggingface_hub's), or, in the wds
layout, from any folder at http(s)://. A file appears under its name when it is whole. Nothing here imports torch.
"""

import re
import urllib.error
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from diptych import files
from diptych.errors import DownloadError, NotFoundError
from diptych.evaluate.datasets.layouts import CLASSNAMES, TEMPLATES, TYPE, find_layout, name_of_split
from diptych.evaluate.datasets.registry import Dataset, Place, guess_place

HUB = "https://huggingface.co/datasets/"
_URL = re.compile(r"https?://", re.IGNORECASE)
_TIMEOUT = 60.0
_BLOCK = 1 << 20
MAX_SMALL = 16 << 20
"""Bytes of a file that is no shard."""


def locate(entry: Dataset, data: Path) -> tuple[Place, Path] | None:
    """The place of a dataset and the folder that its path counts from; None if it is not there."""
    if entry.data is not None and not (entry.data.repo or _URL.match(entry.data.path)):
        root = entry.folder or Path()
        return (entry.data, root) if (root / entry.data.path).exists() else None
    for folder in candidates(entry, data):
        if folder.is_dir():
            return _as_found(entry, folder), folder
    return None


def candidates(entry: Dataset, data: Path) -> list[Path]:
    """Folders that a dataset may be in."""
    repos = [entry.wds, *(place.repo for place in entry.hub)]
    names = [entry.id, *(repo.rpartition("/")[2] for repo in repos if repo)]
    return [data / name for name in dict.fromkeys(names)]


def _as_found(entry: Dataset, folder: Path) -> Place:
    """Place of a folder, with the names of its columns and splits."""
    if entry.data is not None:
        return replace(entry.data, path="", repo="")
    try:
        layout = find_layout(folder, entry.kind)
    except NotFoundError:
        return Place()  # the error comes when it is opened
    if layout == "parquet" and entry.hub:
        return replace(entry.hub[0], repo="", path="")
    return guess_place(folder)


def where_to_get(entry: Dataset) -> str:
    """For people: where a dataset that is not there can be had."""
    if entry.data is not None:
        local = f"{(entry.folder or Path()) / entry.data.path}, which is not there"
        return entry.data.repo or (entry.data.path if _URL.match(entry.data.path) else local)
    if "made" in entry.suites:
        return "python -m recipes.datasets DATA, which makes it"
    hub = [f"{HUB}{repo}" for repo in (entry.wds, *(place.repo for place in entry.hub)) if repo]
    return ", ".join([*hub, *([entry.home] if entry.home else [])]) or "nowhere that the registry knows"


def can_download(entry: Dataset) -> bool:
    """Whether there is something to fetch it from."""
    own = entry.data is not None and bool(entry.data.repo or _URL.match(entry.data.path))
    return own or bool(entry.wds or entry.hub)


def download(entry: Dataset, data: Path, split: str) -> None:
    """Fetch a split into the data folder; DownloadError if it cannot be had whole."""
    target = data / entry.id
    if entry.data is not None and _URL.match(entry.data.path):
        fetch_wds(entry.data.path, target, name_of_split(entry.data, split))
        return
    if entry.data is not None:
        fetch_repo(entry.data.repo, target, name_of_split(entry.data, split))
    elif entry.wds:
        fetch_repo(entry.wds, target, split)
    else:
        fetch_repo(entry.hub[0].repo, target, name_of_split(entry.hub[0], split))


def fetch_repo(repo: str, target: Path, split: str) -> None:
    """Fetch a split of a repository of the hub: a wds folder, or Parquet files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    names = (CLASSNAMES, TEMPLATES, TYPE, f"{split}/*", f"**/{split}-*.parquet", f"{split}-*.parquet")
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=target, allow_patterns=list(names))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DownloadError(f"{HUB}{repo} cannot be fetched: {str(error).splitlines()[0][:200]}") from None


def fetch_wds(url: str, target: Path, split: str) -> None:
    """A split of a folder in the wds layout at a URL; what is there already is kept."""
    base = url.rstrip("/")
    (target / split).mkdir(parents=True, exist_ok=True)
    for name in (CLASSNAMES, TEMPLATES, TYPE):
        _fetch(f"{base}/{name}", target / name, optional=True)
    _fetch(f"{base}/{split}/nshards.txt", target / split / "nshards.txt")
    count = (target / split / "nshards.txt").read_text("utf-8", "replace").strip()
    if not count.isdigit() or len(count) > 6:
        raise DownloadError(f"{base}/{split}/nshards.txt is no number: {count[:40]!r}")
    for number in range(int(count)):
        _fetch(f"{base}/{split}/{number}.tar", target / split / f"{number}.tar")


def _fetch(url: str, target: Path, *, optional: bool = False) -> None:
    """One file, whole or not at all."""
    if target.is_file():
        return
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, files.atomic_file(target) as temporary:
            expected = answer.headers.get("Content-Length")
            with open(temporary, "wb") as out:
                while block := answer.read(_BLOCK):
                    out.write(block)
                    if out.tell() > MAX_SMALL and not target.name.endswith(".tar"):
                        raise DownloadError(f"{url} has more than {MAX_SMALL:,} bytes; it is not what its name says")
            if expected is not None and temporary.stat().st_size != int(expected):
                raise DownloadError(f"{url}: {temporary.stat().st_size:,} bytes came, {int(expected):,} were announced")
    except urllib.error.HTTPError as error:
        if not (optional and error.code == 404):
            raise DownloadError(f"{url}: {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise DownloadError(f"{url} cannot be fetched: {error}") from None
