"""Every architecture behind open_clip's list of published weights beside open_clip, and transformers' other CLIPs.

    .venv-peers/bin/python benchmarks/parity_families.py [--only NAME ...]          (make parity)

It runs in the environment of the peers with our sources beside them (PYTHONPATH=src): nothing else has both. Each
architecture is made cheap, two blocks deep and with a vocabulary of 1,000, but as wide as it is, and filled with random
weights.

theirs -> ours: open_clip writes a hub folder; we load it, and features and logits are compared.
ours -> theirs: where the layout can say it we write the folder; open_clip loads it strictly and computes the same.

Distances are relative to the length of a feature, of logits to the largest one.
"""

# pyright: reportMissingImports=false

import argparse
import contextlib
import functools
import gc
import json
import logging
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip import timm_model
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import load_file

from diptych.checkpoint.formats import open_clip as ours
from diptych.checkpoint.formats import open_clip_config
from diptych.checkpoint.formats import transformers as ours_of_transformers
from diptych.checkpoint.loaded import build
from diptych.errors import DiptychError
from diptych.model import architectures

BOUND = 1e-5
VOCABULARY = 1000
SHALLOW = {"convnext": {"depths": [1, 1, 1, 1]}, "fastvit": {}}
"""How a timm model is made cheap, by the beginning of its name; others have a depth."""
LAYERS = {"m2m_100": "encoder_layers", "mt5": "num_layers"}

Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_twin(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An architecture's `model_cfg` made cheap, and what timm is told besides."""
    config = json.loads(json.dumps(open_clip.get_model_config(name)))
    vision, text, sizes = config["vision_cfg"], config["text_cfg"], {}
    if trunk := vision.get("timm_model_name"):
        sizes = next((v for start, v in SHALLOW.items() if trunk.startswith(start)), {"depth": 2})
    else:
        vision["layers"] = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
    if not text.get("hf_model_name"):
        text |= {"layers": 2, "vocab_size": VOCABULARY}
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(key, None)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1}
    return config, sizes


@contextlib.contextmanager
def made_cheap(sizes: dict[str, Any]) -> Iterator[None]:
    """open_clip builds timm's models with these sizes, and transformers' with two blocks and few tokens, offline."""
    published = dict(architectures.PUBLISHED)
    for name, settings in published.items():
        small = {LAYERS.get(settings["model_type"], "num_hidden_layers"): 2, "vocab_size": VOCABULARY}
        architectures.PUBLISHED[name] = {**settings, **small}  # type: ignore[index]

    def describe(name: str, **_: Any) -> Any:
        settings = dict(architectures.PUBLISHED[name])
        return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)

    before = timm_model.timm, open_clip.hf_model.AutoConfig
    create = functools.partial(timm.create_model, **sizes)
    timm_model.timm = types.SimpleNamespace(create_model=create)
    open_clip.hf_model.AutoConfig = types.SimpleNamespace(from_pretrained=describe)
    try:
        yield
    finally:
        timm_model.timm, open_clip.hf_model.AutoConfig = before
        architectures.PUBLISHED.update(published)  # type: ignore[attr-defined]


def randomize(model: torch.nn.Module) -> None:
    """Every tensor random and of a size that keeps features alive: gains, biases and BatchNorm statistics too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("logit_scale", "logit_bias")) or not tensor.is_floating_point():
                continue
            elif tensor.ndim == 1:
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
            elif any(part in name for part in ("embed", "latent", "query", "token")):
                tensor.normal_(0, 0.5, generator=generator)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)


def draw_inputs(image_size: int, text: dict[str, Any], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures, and texts of 3 tokens, a third of all, and all."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 3, image_size, image_size, generator=generator)
    length = text.get("context_length", 77)
    tokens = torch.randint(3, VOCABULARY - 2, (3, length), generator=generator)
    end: int = text["eos_id"] if text.get("pool_type") == "eos" else VOCABULARY - 1
    for row, count in zip(tokens, (3, max(4, length // 3), length), strict=True):
        row[count - 1], row[count:] = end, pad
    return image, tokens


@torch.inference_mode()
def compute(model: Any, image: torch.Tensor, text: torch.Tensor) -> Features:
    """Features and logits of a model of either side."""
    pictures, words = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    logits = model.logit_scale.exp() * pictures @ words.T
    return pictures, words, logits if model.logit_bias is None else logits + model.logit_bias


def measure(a: Features, b: Features) -> list[float]:
    distances = [((x - y).norm(dim=-1) / y.norm(dim=-1)).max().item() for x, y in zip(a[:2], b[:2], strict=True)]
    return [*distances, ((a[2] - b[2]).abs().max() / b[2].abs().max()).item()]


class NoTokenizer:
    """open_clip saves its tokenizer beside a model; ids are drawn here."""

    def save_pretrained(self, folder: str) -> None: ...


def open_ours(folder: Path, text: Any, pad: int) -> Any:
    """Our model of an OpenCLIP folder, read as users read it but for the tokenizer, which is not there."""
    length = text.get("context_length", 77)
    tokenizer = types.SimpleNamespace(pad_token_id=pad, vocab_size=VOCABULARY, context_length=length)
    before, ours.read_tokenizer = ours.read_tokenizer, lambda *_: tokenizer  # type: ignore[assignment]
    try:
        return build(ours.open_folder(folder))
    finally:
        ours.read_tokenizer = before


def compare(name: str, folder: Path) -> dict[str, Any]:
    """One architecture in both directions."""
    config, sizes = make_twin(name)
    text = config["text_cfg"]
    kind = architectures.PUBLISHED.get(text.get("hf_model_name"), {}).get("model_type")
    pad = architectures.MODEL_TYPES[kind]["pad_token_id"] if kind else text.get("pad_id", 0)
    theirs = create(config, folder / "twin.json")
    randomize(theirs)
    image_size = config["vision_cfg"].get("image_size", 224)
    image, tokens = draw_inputs(image_size, text, pad)
    expected = compute(theirs, image, tokens)
    if sizes:
        config["vision_cfg"]["timm_model_kwargs"] = sizes
    save_for_hf(theirs, NoTokenizer(), config, str(folder / "theirs"), safe_serialization=True)
    del theirs
    loaded = open_ours(folder / "theirs", text, pad)
    outcome: dict[str, Any] = {"read": measure(compute(loaded.model, image, tokens), expected)}
    if (reason := open_clip_config.why_not(loaded.model.config)) is not None:
        return outcome | {"not written": reason}
    (folder / "ours").mkdir()
    ours.write(folder / "ours", loaded)
    written = json.loads((folder / "ours" / ours.CONFIG).read_text())["model_cfg"]
    written["vision_cfg"].pop("timm_model_kwargs", None)  # open_clip 3.3.0 has it by our own hand
    back = create(written, folder / "back.json")
    back.load_state_dict(load_file(folder / "ours" / ours.WEIGHTS[0]), strict=True)
    return outcome | {"written": measure(compute(back, image, tokens), expected)}


def create(config: dict[str, Any], path: Path) -> Any:
    """open_clip's model of a `model_cfg`."""
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return open_clip.create_model(path.stem, pretrained_hf=False).eval()


# --- transformers -----------------------------------------------------------------------------------------------------

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_PICTURES = {**_SMALL, "image_size": 48, "patch_size": 8}
_WORDS = {**_SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_BERT = {**_WORDS, "max_position_embeddings": 90}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "metaclip_2": (
        "MetaClip2",
        {"text_config": {**_WORDS, "eos_token_id": 2, "pad_token_id": 1}, "projection_dim": 48},
    ),
    "siglip": ("Siglip", {"text_config": _WORDS}),
    "chinese_clip": ("ChineseCLIP", {"text_config": _BERT, "projection_dim": 48}),
    "altclip": ("AltCLIP", {"text_config": {**_BERT, "project_dim": 40}, "projection_dim": 48}),
    "siglip2": ("Siglip2", {"text_config": _WORDS}),
}


class OfTransformers:
    """A model of transformers with open_clip's face."""

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self.logit_scale, self.pad = model, model.logit_scale, pad
        self.logit_bias = getattr(model, "logit_bias", None)

    def encode_image(self, image: torch.Tensor, normalize: bool) -> torch.Tensor:
        features = self.model.get_image_features(image).pooler_output
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: torch.Tensor, normalize: bool) -> torch.Tensor:
        is_masked = self.model.config.model_type in ("chinese_clip", "altclip")
        given = {"attention_mask": (text != self.pad).long()} if is_masked else {}
        features = self.model.get_text_features(text, **given).pooler_output
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


def compare_transformers(name: str, folder: Path) -> dict[str, Any]:
    """One of transformers' classes in both directions."""
    prefix, sections = CLASSES[name]
    model_class = getattr(transformers, f"{prefix}Model")
    described = getattr(transformers, f"{prefix}Config")(
        vision_config=_PICTURES if name != "siglip2" else _SMALL, **sections
    )
    model = model_class(described).eval()
    randomize(model)
    words = described.text_config
    is_bert = name in ("chinese_clip", "altclip")
    length, pad = 64, words.pad_token_id
    text = {"context_length": length, **({"pool_type": "eos", "eos_id": 2} if name == "metaclip_2" else {})}
    image, tokens = draw_inputs(_PICTURES["image_size"], text, pad)
    model.save_pretrained(folder / "theirs")
    tokenizer = types.SimpleNamespace(pad_token_id=pad, vocab_size=VOCABULARY, context_length=length)
    before = ours_of_transformers.read_tokenizer
    ours_of_transformers.read_tokenizer = lambda *_: (tokenizer, ())  # type: ignore[assignment]
    try:
        opened = ours_of_transformers.open_folder(folder / "theirs")
    finally:
        ours_of_transformers.read_tokenizer = before
    loaded = build(opened)
    expected = compute(OfTransformers(model, pad), image, tokens)
    outcome: dict[str, Any] = {"read": measure(compute(loaded.model, image, tokens), expected)}
    (folder / "ours").mkdir()
    writer, ours_of_transformers._write_tokenizer = ours_of_transformers._write_tokenizer, lambda *_: None
    try:
        ours_of_transformers.write(folder / "ours", loaded)
    finally:
        ours_of_transformers._write_tokenizer = writer
    back, found = model_class.from_pretrained(folder / "ours", output_loading_info=True)
    if odd := [*found["missing_keys"], *found["unexpected_keys"]]:
        return outcome | {"not written": f"{odd[:3]} (BERT: {is_bert})"}
    return outcome | {"written": measure(compute(OfTransformers(back.eval(), pad), image, tokens), expected)}


# --- the table --------------------------------------------------------------------------------------------------------


def run_one(name: str) -> dict[str, Any]:
    """The outcome of one case; what went wrong is a line of it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if name.startswith("transformers:"):
                return compare_transformers(name.partition(":")[2], Path(folder))
            with made_cheap(make_twin(name)[1]):
                return compare(name, Path(folder))
    except DiptychError as error:
        return {"refused": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def passes(outcome: dict[str, Any]) -> bool:
    """Whether it is read within the bound, and what is written is read back there within it."""
    return "read" in outcome and max(outcome["read"] + outcome.get("written", [])) < BOUND


def main() -> int:
    logging.disable(logging.WARNING)  # that weights are random
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description="every published architecture beside open_clip")
    parser.add_argument("--only", nargs="+", help="architectures; transformers:siglip for one of transformers' classes")
    only = parser.parse_args().only
    tags: dict[str, set[tuple[str, str]]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, set()).add((name.removesuffix("-quickgelu"), tag))
    audio = {name for name in tags if "vision_cfg" not in open_clip.get_model_config(name)}
    names = only or [*sorted(tags.keys() - audio), *(f"transformers:{name}" for name in CLASSES)]
    seen: dict[str, dict[str, Any]] = {}
    good, all_tags = set[tuple[str, str]](), set[tuple[str, str]]().union(*tags.values())
    largest, failed = 0.0, []
    print(f"{'architecture':34} {'tags':>4} {'image':>8} {'text':>8} {'logits':>8}   written, read by open_clip")
    for name in names:
        key = name if ":" in name else json.dumps(make_twin(name))
        if key not in seen:
            seen[key] = run_one(name)
            gc.collect()
        outcome = seen[key]
        numbers = outcome.get("read", [])
        line = " ".join(f"{number:8.1e}" for number in numbers)
        back = f"{max(outcome['written']):.1e}" if "written" in outcome else ""
        reason = next((f"{k}: {outcome[k]}" for k in ("not written", "refused", "failed") if k in outcome), "")
        print(f"{name:34} {len(tags.get(name, ())):4} {line:26}   {back}{reason}", flush=True)
        largest = max([largest, *numbers, *outcome.get("written", [])])
        if passes(outcome):
            good |= tags.get(name, set())
        elif name != "transformers:siglip2":
            failed.append(name)
    print(f"largest distance {largest:.1e}; not within {BOUND:.0e}: {', '.join(failed) or 'none'}")
    if not only:
        print(
            f"{len(good)} of {len(all_tags)} tags of open_clip {open_clip.__version__} are of architectures that pass; "
            f"for sound, and left out: {', '.join(sorted(audio)) or 'none'}"
        )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
