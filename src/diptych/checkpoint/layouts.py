"""Every layout in one table, and what is done with any of them: open, load, save, convert.

open_checkpoint(source)   looks into a checkpoint of any layout: sizes, activation, files; reads no weights
load(source)              -> Loaded(model, preprocess, tokenizer)
save(loaded, out, layout) writes it, all or nothing
convert(loaded, out, layout)   the same, and holds the features read back against those before
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diptych import files
from diptych.checkpoint import sources, surgery
from diptych.checkpoint.config import WeightsDtype
from diptych.checkpoint.formats import native, onnx, open_clip, openai, transformers
from diptych.checkpoint.loaded import Loaded, Opened, build
from diptych.checkpoint.weights.tensors import read_json
from diptych.config import to_dict
from diptych.errors import CheckpointError, NotFoundError, UsageError, unknown_name
from diptych.model.config import Activation, check_activation
from diptych.model.device import choose_device


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to write a model."""

    is_file: bool
    """A single file, not a folder."""
    why_not: Callable[[Loaded], str | None]
    """Why it cannot hold a model, if so."""
    write: Callable[[Path, Loaded], object]
    """Into a new file, or an empty folder."""
    check: Callable[[Path, Loaded], dict[str, float]]
    """Largest difference of each tower's features between what was written and the model."""
    tolerance: float = 1e-5
    """Largest allowed difference in float32, relative to the features' length; more where another engine computes."""


ROUNDING: Mapping[str, float] = {"float32": 0.0, "float16": 1e-2, "bfloat16": 1e-1}
"""The most that rounding the weights may change features, relative to their length."""


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: Activation | None = None,
    preset: str | None = None,
) -> Loaded:
    """Load a model in evaluation mode with the preprocessing and the tokenizer that belong to it.

    `source`: a checkpoint folder or a run's folder of ours; a folder of OpenCLIP's or transformers'; a file of weights
    (OpenAI's archives, state dicts); `hf-hub:owner/name[@revision]`; or a published name, `ViT-B-32/openai`. Only the
    last two use the network, and only for what is not in the cache.

    `device`: "cpu", "cuda", "cuda:1", ..., or "auto", a GPU if there is one.

    `activation` ("quick_gelu" or "gelu") is needed for a bare file that does not show which one it was trained with;
    `preset` names the architecture where shapes alone do not tell the number of heads. Raises NotFoundError for what is
    not there, UsageError for what must be said or a device that is not here, CheckpointError for what is damaged or of
    another family.
    """
    chosen = choose_device(str(device))
    opened = open_checkpoint(source, activation=activation, preset=preset)
    with sources.explain_damage(opened.path):
        loaded = build(opened, dtype)
    return loaded._replace(model=loaded.model.to(chosen))


def open_checkpoint(source: str | Path, *, activation: Activation | None = None, preset: str | None = None) -> Opened:
    """Look into a checkpoint of any layout, without reading its weights. Arguments and errors as `load`."""
    path, published = sources.resolve(source, why_not_published)
    with sources.explain_damage(path):
        return _open(path, published, activation, preset)


def _open(path: Path, published: sources.Published | None, activation: Activation | None, preset: str | None) -> Opened:
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    # The config beside a file of weights is better evidence than the file alone.
    folder, weights = (path.parent, path) if path.is_file() else (path, None)

    def describes(config: str, names: tuple[str, ...]) -> bool:
        return (folder / config).is_file() and (weights is None or weights.name in names)

    if describes(native.DESCRIPTION, (native.WEIGHTS,)):
        opened = native.open_folder(folder)
    elif describes(open_clip.CONFIG, open_clip.WEIGHTS):
        return open_clip.open_folder(folder, weights, activation, published)
    elif describes(transformers.CONFIG, transformers.WEIGHTS) and "model_type" in read_json(
        folder / transformers.CONFIG
    ):
        opened = transformers.open_folder(folder, weights)
    elif weights is not None:
        return openai.open_file(weights, activation, preset, published)
    elif any(folder.glob("step_*")):
        opened = native.open_folder(native.find(folder))
    else:
        raise _no_checkpoint(folder)
    if activation is None:
        return opened
    config = replace(opened.config, activation=check_activation(activation))
    return replace(opened, config=config, evidence={**opened.evidence, "activation": "given by the caller"})


def why_not_published(published: sources.Published) -> str | None:
    """Why published weights cannot be loaded, as far as their architecture tells; None if they can."""
    place = Path(open_clip.CONFIG)
    try:
        open_clip.read_config(place, {"model_cfg": dict(published.model_cfg)}, published.activation, None)
    except (CheckpointError, UsageError) as error:
        return str(error).removeprefix(f"{place}: ")
    return None


def _no_checkpoint(folder: Path) -> NotFoundError:
    if any((folder / name).is_file() for name in onnx.FILES.values()):
        return NotFoundError(f"no checkpoint in {folder}: it holds ONNX files, a computation that cannot be read back")
    if (folder / "adapter_config.json").is_file():
        return NotFoundError(
            f"no checkpoint in {folder}: it is a LoRA adapter; name the run's folder, or its base model"
        )
    if (folder / "modules.json").is_file():
        inner = next(iter(sorted(folder.glob("*_CLIPModel"))), folder / "0_CLIPModel")
        return NotFoundError(f"no checkpoint in {folder}: it is a sentence-transformers folder; name {inner}")
    weights = sorted(file.name for pattern in ("*.pt", "*.bin", "*.safetensors") for file in folder.glob(pattern))
    hint = f"; name one of its files: {', '.join(weights[:5])}" if weights else ""
    return NotFoundError(
        f"no checkpoint in {folder}: none of {native.DESCRIPTION}, {open_clip.CONFIG}, {transformers.CONFIG}{hint}"
    )


def save(loaded: Loaded, out: Path | str, layout: str = "diptych", *, overwrite: bool = False) -> None:
    """Write a model in any layout, all or nothing: the file or folder appears when it is complete.

    Raises UsageError if the layout cannot hold the model, saying why, or if `out` exists (`overwrite` replaces a file
    of weights or a folder that holds a checkpoint, never anything else).
    """
    with _writing(loaded, Path(out), layout, overwrite):
        pass


def convert(
    loaded: Loaded,
    out: Path | str,
    layout: str,
    *,
    precision: WeightsDtype = "float32",
    overwrite: bool = False,
) -> dict[str, float]:
    """`save`, read back, and compare features of pictures and texts before what was written is kept.

    Returns the largest difference of image and of text features, relative to their length. Raises CheckpointError, and
    leaves nothing behind, if it is above the layout's tolerance, or what rounding to `precision` explains.
    """
    changed, reference = (surgery.change_precision(loaded, wanted) for wanted in (precision, "float32"))
    with _writing(changed, Path(out), layout, overwrite) as written:
        differences = LAYOUTS[layout].check(written, reference)
        allowed = max(LAYOUTS[layout].tolerance, ROUNDING[precision])
        for tower, difference in differences.items():
            if not difference <= allowed:
                raise CheckpointError(
                    f"{out} was not written: {tower} features differ by {difference:.1e} of their length after the "
                    f"conversion, at most {allowed:.0e} is allowed"
                )
    return differences


def compare(before: Loaded, after: Loaded) -> dict[str, float]:
    """Largest difference between features of two float32 models, relative to their length, on drawn inputs."""
    generator = torch.Generator().manual_seed(0)
    size = before.model.config.vision.image_size
    image = torch.randn(4, 3, size, size, generator=generator)
    if not torch.equal(before.tokenizer(_TEXTS), after.tokenizer(_TEXTS)) or before.preprocess != after.preprocess:
        raise CheckpointError("tokenizer or preprocessing came out differently")
    text = before.tokenizer(_TEXTS)
    with torch.inference_mode():
        return {
            "image": _difference(before.model.encode_image(image), after.model.encode_image(image)),
            "text": _difference(before.model.encode_text(text), after.model.encode_text(text)),
        }


_TEXTS = ["a photo of a cat", "", "Zwölf Boxkämpfer &amp; 42 more; naïve 数字", "one two three four five six " * 20]


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm(dim=-1) / a.float().norm(dim=-1)).max().item()


@contextlib.contextmanager
def _writing(loaded: Loaded, out: Path, name: str, overwrite: bool) -> Iterator[Path]:
    """Write to a temporary place, let the caller look at it, then give it its name."""
    if name not in LAYOUTS:
        raise unknown_name("layout", name, LAYOUTS)
    layout = LAYOUTS[name]
    check_place(out, name, overwrite=overwrite)
    if (reason := layout.why_not(loaded)) is not None:
        raise UsageError(f"the layout {name} cannot hold this model: {reason}; diptych's own layout holds every model")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(out.parent, out.name)  # of a kill, which may have taken the name of the old one too
    place = files.atomic_file(out) if layout.is_file else files.atomic_folder(out)
    with place as temporary:
        layout.write(temporary, loaded)
        yield temporary


def check_place(out: Path, name: str, *, overwrite: bool) -> None:
    """Raise UsageError unless a layout may be written there."""
    is_file = LAYOUTS[name].is_file
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; name another place, or --overwrite it")
    if out.is_symlink():
        raise UsageError(f"{out} is a link, which is not overwritten; name what it leads to")
    if out.is_dir() and (is_file or not _holds_a_model(out)):
        raise UsageError(f"{out} is a folder that holds no checkpoint, and is not overwritten; name another place")
    if out.is_dir() and (others := _find_others(out)):
        named = ", ".join(others[:3])
        raise UsageError(
            f"{out} holds more than a checkpoint ({named}), all of which --overwrite would delete; name another place"
        )
    if out.is_file() and not is_file:
        raise UsageError(f"{out} is a file, and the layout {name} is a folder; name another place")


def _holds_a_model(folder: Path) -> bool:
    names = {native.DESCRIPTION, open_clip.CONFIG, transformers.CONFIG, *onnx.FILES.values()}
    return any((folder / name).is_file() for name in names) or not any(folder.iterdir())


def _find_others(folder: Path) -> list[str]:
    """Names of what is in a folder and in no layout: a run's checkpoints, somebody's own files."""
    return sorted(one.name for one in folder.iterdir() if one.is_dir() or not _KNOWN.fullmatch(one.name))


_KNOWN = re.compile(
    r"(checkpoint|training|diptych_tokenizer|preprocess|config|open_clip_config|preprocessor_config|processor_config|tokenizer"
    r"|tokenizer_config|special_tokens_map|vocab)\.json|merges\.txt|README\.md|\.gitattributes|.*\.onnx(\.data)?"
    r"|(model|training|open_clip_model|pytorch_model|open_clip_pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|(model|pytorch_model)\.(safetensors|bin)\.index\.json"
)
"""Files that the layouts have."""


def _read_back(written: Path, original: Loaded) -> dict[str, float]:
    """Compare a model with what was written, for a layout that can be read."""
    return compare(original, load(written, activation=original.model.config.activation))


def _write_onnx(folder: Path, loaded: Loaded) -> None:
    onnx.export(loaded.model, folder)
    loaded.tokenizer.save(folder)
    files.write_json(folder / "preprocess.json", to_dict(loaded.preprocess))


LAYOUTS: Mapping[str, Layout] = {
    "diptych": Layout(is_file=False, why_not=lambda _: None, write=native.write, check=_read_back),
    "open_clip": Layout(is_file=False, why_not=open_clip.why_not, write=open_clip.write, check=_read_back),
    "transformers": Layout(is_file=False, why_not=transformers.why_not, write=transformers.write, check=_read_back),
    "openai": Layout(is_file=True, why_not=openai.why_not, write=openai.write, check=_read_back),
    "onnx": Layout(
        is_file=False,
        why_not=lambda _: None,
        write=_write_onnx,
        check=lambda folder, loaded: onnx.compare(loaded.model, folder),
        tolerance=1e-4,
    ),
}
"""By name. ONNX holds a computation, not a model: it is written, never read back into one."""
