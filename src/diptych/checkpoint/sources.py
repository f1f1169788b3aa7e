"""From what a user says to a place on this machine.

    runs/demo  ViT-B-32.pt            a path: no network, ever
    hf-hub:owner/name[@revision]      a repository, fetched file by file into huggingface_hub's cache
    ViT-B-32/openai                   a published name, which stands for a repository (assets/published.json)

The cache, tokens, progress bars, resumption of broken transfers and offline mode (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT) are the library's. What was downloaded is held against the sha256 that the hub names it by.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diptych import files
from diptych.checkpoint.weights.tensors import beside, read_json, short
from diptych.errors import CheckpointError, DownloadError, NotFoundError, UsageError, unknown_name
from diptych.model.config import Activation

HUB = "hf-hub:"
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What each layout consists of: its config, what may lie beside it, and its weights, the best first.
_NATIVE = "checkpoint.json"
_FOREIGN = {
    "open_clip_config.json": (
        (),
        ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    ),
    "config.json": (
        (
            *("preprocessor_config.json", "processor_config.json"),
            *("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json"),
        ),
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    ),
}

_ALL_CONFIGS = (_NATIVE, *_FOREIGN)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Published:
    """Facts about weights that were published under a name."""

    name: str
    """ARCHITECTURE/TAG, as in OpenCLIP's tables."""
    family: str
    """Who trained it, or what is special about it: SigLIP 2, MetaCLIP, CoCa, ..."""
    repository: str | None = None
    """Where it lies on the hub; None if it was published as a single file only."""
    url: str | None = None
    """Where that file lies."""
    weights: str | None = None
    """Name of the weights in the repository, where it is not OpenCLIP's."""
    activation: Activation
    parameters: int
    """Numbers of both towers, and of a CoCa's decoder."""
    model_cfg: Mapping[str, Any]
    """OpenCLIP's description of the architecture."""
    languages: int = 1
    """Of the captions it was trained on, at least; 1 is English."""
    licence: str | None = None
    """Of the weights, as far as it is known; their own page is what counts."""
    mean: tuple[float, float, float] | None = None
    """Mean of the preprocessing, where it is not OpenAI's."""
    std: tuple[float, float, float] | None = None
    resize: Literal["shorter_side", "squash"] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    file: str | None = None
    """Name under which the weights were also published as a single file."""
    sha256: str | None = None
    """SHA-256 of the published file, or the beginning of it."""

    @property
    def image_size(self) -> int:
        """Side of the pictures it takes, pixels; the largest, where it takes any shape."""
        return self.model_cfg["vision_cfg"].get("image_size", 224)

    @property
    def context_length(self) -> int:
        """Tokens of the texts it takes."""
        return self.model_cfg["text_cfg"].get("context_length", 77)

    @property
    def tokenizer(self) -> Mapping[str, Any] | None:
        """Repository of its tokenizer.json ("name") and OpenCLIP's arguments for it; None if it is CLIP's own."""
        text = self.model_cfg["text_cfg"]
        if (name := text.get("hf_tokenizer_name")) is None:
            return None
        return {"name": name, "clean": "whitespace", **text.get("tokenizer_kwargs", {})}


class Resolved(NamedTuple):
    """Where a checkpoint lies, and what is known of it beforehand."""

    path: Path
    published: Published | None = None


def resolve(source: str | Path, why_not: Callable[["Published"], str | None] = lambda _: None) -> Resolved:
    """Find a checkpoint, fetching it if it is named by repository or published name and not in the cache.

    `why_not` says of published weights why they are not worth fetching, if so. Raises NotFoundError for what does not
    exist, DownloadError if the network fails, CheckpointError for a repository that holds no checkpoint, a download
    that came out wrong, or weights that are not worth it.
    """
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is not known
        raise NotFoundError(f"no such model: {short(str(source))} ({error})") from None
    if exists or isinstance(source, Path):
        if not exists and not path.is_symlink():
            raise NotFoundError(f"no such model: {path} (a checkpoint folder or file, or a run's folder)")
        return Resolved(path)
    if source.startswith(HUB):
        match = _REPOSITORY.fullmatch(source.removeprefix(HUB))
        if match is None:
            raise UsageError(f"{source!r} names no repository; use hf-hub:owner/name or hf-hub:owner/name@revision")
        return Resolved(fetch(match[1], match[2]))
    published = find_name(source)
    if published.repository is None:
        raise DownloadError(f"{source} lies in no repository; fetch {published.url} and name the file")
    if (reason := why_not(published)) is not None:
        raise CheckpointError(f"{source} ({published.family}) cannot be loaded by this diptych: {reason}")
    return Resolved(fetch(published.repository), published)


@cache
def load_published() -> Mapping[str, Published]:
    """The published weights by name; facts from OpenCLIP's tables (assets/README.md)."""
    table = json.loads(resources.files("diptych.assets").joinpath("published.json").read_text("utf-8"))
    known = table["architectures"]
    return {name: _published(name, entry | known[name.split("/")[0]]) for name, entry in table["weights"].items()}


def _published(name: str, entry: dict) -> Published:
    file = entry.pop("file", {})
    for key in ("mean", "std"):
        if key in entry:
            entry[key] = tuple(entry[key])
    return Published(name=name, file=file.get("name"), sha256=file.get("sha256"), **entry)


def find_name(name: str) -> Published:
    """Look a published name up; `-quickgelu` may be added to the architecture where it says the truth."""
    table = load_published()
    plain = name.replace("-quickgelu/", "/")
    if (found := table.get(plain)) is not None:
        if plain != name and found.activation != "quick_gelu":
            raise UsageError(f"{name} does not exist: these weights were trained with GELU; use {plain}")
        return found
    architectures = {known.split("/")[0] for known in table}
    if (written := name.replace("/", "-").removesuffix("@336px")) in architectures:  # as in the paper: ViT-B/32
        tags = [known for known in table if known.split("/")[0] == written]
        raise NotFoundError(f"{name} is an architecture; name its weights too, such as {' or '.join(tags[:3])}")
    architecture = name.split("/")[0]
    if architecture in architectures:
        raise unknown_name("published weights", name, (n for n in table if n.split("/")[0] == architecture))
    looks_like_a_path = name.startswith((".", "/", "~")) or "\\" in name or Path(name).suffix in _SUFFIXES
    if name.count("/") == 1 and not looks_like_a_path and not Path(architecture).is_dir():
        near = difflib.get_close_matches(architecture, architectures, n=1)
        hint = f"{near[0]}/{name.split('/')[1]}" if near else f"hf-hub:{name}"
        raise NotFoundError(
            f"no such model: {name} (no such path, and no published weights); did you mean {hint}? "
            "`diptych models` lists the published ones"
        )
    beside = sorted(path.name for path in Path(name).parent.iterdir()) if Path(name).parent.is_dir() else []
    there = f"; in {Path(name).parent} there are {', '.join(beside[:5])}" if "/" in name and beside else ""
    raise NotFoundError(
        f"no such model: {name} (no file or folder of this name{there}; repositories are named hf-hub:owner/name, "
        "published weights like ViT-B-32/openai: `diptych models` lists them)"
    )


_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".safetensors", ".json"})


def find_published(file: Path) -> Published | None:
    """The published weights that a file is: by its name and the sha256 of its content, not by its name alone."""
    for published in load_published().values():
        if published.file == file.name and published.sha256:
            return published if files.sha256(file).startswith(published.sha256) else None
    return None


# --- the hub ---------------------------------------------------------------------------------------------------------


def fetch(repository: str, revision: str | None = None) -> Path:
    """Bring what a layout needs of a repository into the cache; the folder where it lies."""
    # What is in the cache comes first, so that a hub out of reach is not waited for.
    for config in sorted(_ALL_CONFIGS, key=lambda name: not isinstance(_cached(repository, name, revision), Path)):
        path = _download(repository, config, revision)
        if path is None:
            continue
        with explain_damage(path.parent):
            found = _fetch_rest(repository, config, path)
        if found:
            return path.parent
    raise CheckpointError(
        f"{HUB}{repository} holds no checkpoint of CLIP: none of {_NATIVE}, {', '.join(_FOREIGN)} with its weights"
    )


def _fetch_rest(repository: str, config: str, path: Path) -> bool:
    """Bring what a layout needs beside its config; False if it is the config of something else."""
    commit = path.parent.name  # everything from the same commit
    if config == "config.json" and read_json(path).get("model_type") is None:
        return False
    if config == _NATIVE:
        listed = read_json(path).get("files")
        for name in listed if isinstance(listed, dict) else ():
            _require(repository, [beside(path, name).name], commit)
        return True
    more, weights = _FOREIGN[config]
    for name in (*more, *(_TOKENIZER if _has_tokenizer(read_json(path)) else ())):
        _download(repository, name, commit)
    found = _require(repository, weights, commit)
    if found.name.endswith(".index.json"):
        shards = read_json(found).get("weight_map")
        for name in sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else ():
            _require(repository, [beside(found, name).name], commit)
    return True


def _has_tokenizer(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for a tokenizer other than CLIP's."""
    if config.get("model_type") not in (None, "clip"):
        return True
    model = config.get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, dict) else None
    return isinstance(text, dict) and bool(text.get("hf_tokenizer_name"))


def _require(repository: str, names: Sequence[str], commit: str) -> Path:
    for name in names:
        if (path := _download(repository, name, commit)) is not None:
            return path
    raise CheckpointError(f"{HUB}{repository} is incomplete: it has none of {', '.join(map(short, names))}")


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    """One file, from the cache or the hub; None if the repository does not have it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = _cached(repository, name, revision)
    if cached is False and revision and _COMMIT.fullmatch(revision):
        return None  # a commit does not change
    if cached is None and not constants.HF_HUB_OFFLINE:
        _reach_hub(repository, constants.ENDPOINT)
    try:
        with _one_line(repository):
            path = Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:  # not in the cache, and the hub was not asked or did not answer
        if cached is False:
            return None
        if not constants.HF_HUB_OFFLINE:
            reason = short(str(error.__cause__ or error).split("\n")[0])
            raise DownloadError(
                f"{HUB}{repository}: {name} cannot be fetched and is not in the cache ({reason})"
            ) from None
        if name in _ALL_CONFIGS and not any(_cached(repository, config, revision) for config in _ALL_CONFIGS):
            raise DownloadError(
                f"{HUB}{repository} is not in the cache, and offline mode is on (HF_HUB_OFFLINE); "
                "fetch it once without it"
            ) from None
        return None
    except EntryNotFoundError:
        return None
    if not isinstance(cached, Path) and (expected := expected_sha256(path)) is not None:
        check_download(path, expected)
    return path


@cache
def _reach_hub(repository: str, endpoint: str) -> None:
    """Ask the hub once before its library does, which asks one that is out of reach for half a minute."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, _NATIVE))
    except (errors.HfHubHTTPError, errors.FileMetadataError, errors.HFValidationError):
        pass  # it answers; what, is said when the file is asked for
    except Exception as error:  # of the HTTP library below, whose tree is not part of the hub library's interface
        reason = short(str(error).split("\n")[0] or type(error).__name__)
        raise DownloadError(
            f"{HUB}{repository}: it cannot be fetched and is not in the cache ({endpoint} does not answer: {reason}); "
            "without a network, name a local folder or file"
        ) from None


def _cached(repository: str, name: str, revision: str | None) -> Path | Literal[False] | None:
    """Where the cache has a file; False if it knows that the repository has none; None if it knows nothing."""
    from huggingface_hub import try_to_load_from_cache

    with _one_line(repository):
        found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None if found is None else False


def expected_sha256(path: Path) -> str | None:
    """The sha256 by which the hub knows a file in its cache: the name of the blob that it links to."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def check_download(path: Path, expected: str) -> None:
    """Hold a download to its hash; a wrong one is removed, so that the next try fetches it again."""
    kind = "sha256" if _SHA256.fullmatch(expected) else "git hash"
    found = files.sha256(path) if kind == "sha256" else _git_hash(path.read_bytes())
    if found != expected:
        try:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        except OSError:
            remedy = f"delete {path.resolve()} and try again"
        else:
            remedy = "it was removed, try again"
        raise CheckpointError(f"{path} came out wrong: its {kind} is {found}, not {expected}; {remedy}")


@contextmanager
def explain_damage(place: Path) -> Iterator[None]:
    """Where a checkpoint cannot be read, see whether it is half a file in the hub's cache, and let go of that."""
    try:
        yield
    except CheckpointError:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            blob = Path(os.path.realpath(path))  # also of a link that leads to itself
            if blob.parent.name == "blobs" and (_SHA256.fullmatch(blob.name) or _COMMIT.fullmatch(blob.name)):
                check_download(path, blob.name)
        raise


def _git_hash(data: bytes) -> str:
    """How the hub names a small file in its cache: as git does."""
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """The library's errors as ours, except a file that is not there."""
    from huggingface_hub import errors

    name = f"{HUB}{repository}"
    try:
        yield
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError:
        raise DownloadError(
            f"{name} is gated: accept its conditions on its page, then log in (`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{name} has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(
            f"no such model: {name} (no such repository, or a private one: log in, or set HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name} names no repository: {short(str(error))}") from None
    except OSError as error:  # HTTP errors, a lost connection, a full disk
        raise DownloadError(f"{name} cannot be fetched: {short(str(error).strip() or type(error).__name__)}") from None
    except Exception as error:  # of the HTTP library below, whose tree is not part of the hub library's interface
        raise DownloadError(f"{name} cannot be fetched: {type(error).__name__}: {short(str(error))}") from None
