"""Small checkpoints as other libraries write them, with the features that those libraries compute from them.

    .venv-peers/bin/python tests/golden/make_checkpoints.py        writes tests/fixtures/checkpoints/

open_clip's hub folder, a TorchScript archive of open_clip's CLIP in half precision (as OpenAI released theirs), both
for a ViT and a ResNet, and transformers' CLIPModel folder. Also how open_clip and transformers resize positions.
A vocabulary of 520 ids keeps the files small; ours lies beside the weights, or under transformers' file names.
"""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import transformers
from open_clip.push_to_hf_hub import save_for_hf
from weights import fill, inputs

OUT = Path(__file__).parents[1] / "fixtures" / "checkpoints"
TEXT = {"context_length": 16, "vocab_size": 520, "width": 64, "layers": 1, "heads": 1}
MODELS = {
    "vit": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "patch_size": None},
        "text_cfg": TEXT,
    },
}
MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "a n", "an d</w>")


def tensors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures and three texts of the small vocabulary."""
    image, text = inputs(size, 16, 520, pictures=2)
    return torch.from_numpy(image), torch.from_numpy(text)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: torch.from_numpy(np.asarray(values)) for name, values in fill(shapes).items()}
    model.load_state_dict({n: w.half().float() for n, w in weights.items()}, strict=False)
    return model.eval()


class Vocabulary:
    """Leaves our tokenizer beside open_clip's weights: its own configs cannot name one of another size."""

    def save_pretrained(self, folder: Path) -> None:
        record = {"format": "diptych tokenizer", "version": 1, "vocab_size": 520, "merges": list(MERGES)}
        record |= {"context_length": 16, "special_tokens": "escape"}
        (folder / "diptych_tokenizer.json").write_text(json.dumps(record, indent=0))


def write_open_clip(name: str, config: dict) -> torch.nn.Module:
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    path.unlink()
    model = randomize(open_clip.create_model(name))
    save_for_hf(model, Vocabulary(), config, OUT / f"open_clip_{name}", safe_serialization=True)
    return model


def write_torchscript(name: str, model: torch.nn.Module, image: torch.Tensor, text: torch.Tensor) -> None:
    folder = OUT / f"torchscript_{name}"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, {"forward": (image, text)}, check_trace=False)
    traced.half().save(folder / "model.pt")
    Vocabulary().save_pretrained(folder)


def write_transformers(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ViT of other heads and MLPs than the paper's rule, GELU."""
    config = transformers.CLIPConfig(
        projection_dim=24,
        text_config={"vocab_size": 520, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 16, "hidden_act": "gelu", "eos_token_id": 519},
        vision_config={"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
    )
    model = randomize(transformers.CLIPModel(config))
    folder = OUT / "transformers_vit"
    model.save_pretrained(folder)
    letters = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(256, 324)]]
    tokens = [*letters, *(a + "</w>" for a in letters), *(m.replace(" ", "") for m in MERGES)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in MERGES]).save_pretrained(folder)
    image_features = model.get_image_features(pixel_values=image).pooler_output
    return image_features, model.get_text_features(input_ids=text).pooler_output


def positions() -> dict[str, np.ndarray]:
    """One grid of 5 x 5 positions resized to 8 x 8 and 3 x 3, and 16 text positions to 24."""
    draw = torch.from_numpy(np.random.default_rng(5).standard_normal((26, 6)).astype(np.float32))
    config = transformers.CLIPVisionConfig(hidden_size=6, num_attention_heads=1, image_size=40, patch_size=8)
    embeddings = transformers.models.clip.modeling_clip.CLIPVisionEmbeddings(config)
    embeddings.position_embedding.weight.data = draw.clone()
    stored = {"grid": draw.numpy()}
    for side in (8, 3):
        state = {"visual.positional_embedding": draw.clone()}
        visual = SimpleNamespace(grid_size=(side, side))
        open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=visual))
        stored[f"open_clip_{side}"] = state["visual.positional_embedding"].numpy()
        patches = torch.zeros(1, side * side + 1, 6)
        stored[f"transformers_{side}"] = embeddings.interpolate_pos_encoding(patches, 8 * side, 8 * side)[0].numpy()
    curve = torch.from_numpy(np.random.default_rng(6).standard_normal((16, 6)).astype(np.float32))
    state = {"positional_embedding": curve.clone()}
    open_clip.model.resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.zeros(24, 6)))
    return stored | {"curve": curve.numpy(), "open_clip_context_24": state["positional_embedding"].numpy()}


@torch.no_grad()
def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    features = {}
    for name, config in MODELS.items():
        image, text = tensors(config["vision_cfg"]["image_size"])
        model = write_open_clip(name, config)
        pair = {"image": model.encode_image(image).numpy(), "text": model.encode_text(text).numpy()}
        write_torchscript(name, model, image, text)
        for layout in ("open_clip", "torchscript"):
            features |= {f"{layout}_{name}/{tower}": values for tower, values in pair.items()}
    image, text = write_transformers(*tensors(32))
    features |= {"transformers_vit/image": image.numpy(), "transformers_vit/text": text.numpy()}
    np.savez(OUT / "features.npz", **features)
    np.savez(OUT / "positions.npz", **positions())
    size = sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file())
    versions = f"open_clip {open_clip.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"wrote {OUT.name}: {size:,} bytes from {versions}")


if __name__ == "__main__":
    main()
