"""Features of small models of every family, as open_clip and transformers compute them.

    .venv-peers/bin/python tests/golden/make_features.py        writes tests/fixtures/features.npz

Weights and inputs come from `weights.py`; only the features are stored.
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from weights import CONFIGS, TEXT, fill, inputs

OUT = Path(__file__).parents[1] / "fixtures" / "features.npz"


def open_clip_model(vision: dict, embed_dim: int, quick_gelu: bool) -> torch.nn.Module:
    vision = dict(vision)
    heads = vision.pop("heads", None)
    if heads:
        vision["head_width"] = vision["width"] // heads
    model = CLIP(embed_dim, CLIPVisionCfg(**vision), CLIPTextCfg(**TEXT), quick_gelu=quick_gelu)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: torch.from_numpy(np.asarray(values)) for name, values in fill(shapes).items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def transformers_model(vision: dict, embed_dim: int, quick_gelu: bool, weights: dict) -> torch.nn.Module:
    """The same weights under transformers' names; projections are stored transposed there."""
    activation = "quick_gelu" if quick_gelu else "gelu"
    tower = {"hidden_act": activation, "attention_dropout": 0.0}
    config = transformers.CLIPConfig(
        projection_dim=embed_dim,
        text_config=tower
        | {
            "vocab_size": TEXT["vocab_size"],
            "hidden_size": TEXT["width"],
            "intermediate_size": 4 * TEXT["width"],
            "num_hidden_layers": TEXT["layers"],
            "num_attention_heads": TEXT["heads"],
            "max_position_embeddings": TEXT["context_length"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        vision_config=tower
        | {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    )
    model = transformers.CLIPModel(config)
    renamed = {"logit_scale": weights["logit_scale"]}
    renamed["text_projection.weight"] = weights["text_projection"].T
    renamed["visual_projection.weight"] = weights["visual.proj"].T
    text, image = "text_model.embeddings", "vision_model.embeddings"
    renamed[f"{text}.token_embedding.weight"] = weights["token_embedding.weight"]
    renamed[f"{text}.position_embedding.weight"] = weights["positional_embedding"]
    renamed[f"{image}.class_embedding"] = weights["visual.class_embedding"]
    renamed[f"{image}.patch_embedding.weight"] = weights["visual.conv1.weight"]
    renamed[f"{image}.position_embedding.weight"] = weights["visual.positional_embedding"]
    for end in ("weight", "bias"):
        renamed[f"text_model.final_layer_norm.{end}"] = weights[f"ln_final.{end}"]
        renamed[f"vision_model.pre_layrnorm.{end}"] = weights[f"visual.ln_pre.{end}"]
        renamed[f"vision_model.post_layernorm.{end}"] = weights[f"visual.ln_post.{end}"]
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for ours, theirs, layers in (("", "text_model", TEXT["layers"]), ("visual.", "vision_model", vision["layers"])):
        for i in range(layers):
            source, target = f"{ours}transformer.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            for end in ("weight", "bias"):
                for a, b in parts.items():
                    renamed[f"{target}.{b}.{end}"] = weights[f"{source}.{a}.{end}"]
                for letter, part in zip("qkv", np.split(weights[f"{source}.attn.in_proj_{end}"], 3), strict=True):
                    renamed[f"{target}.self_attn.{letter}_proj.{end}"] = part
    state = {name: torch.from_numpy(np.array(values)) for name, values in renamed.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name for name in missing), missing
    return model.eval()


@torch.inference_mode()
def main() -> None:
    features = {}
    for name, (vision, embed_dim, quick_gelu) in CONFIGS.items():
        model = open_clip_model(vision, embed_dim, quick_gelu)
        image, text = map(torch.from_numpy, inputs(vision["image_size"]))
        features[f"open_clip/{name}/image"] = model.encode_image(image).numpy()
        features[f"open_clip/{name}/text"] = model.encode_text(text).numpy()
        if "patch_size" not in vision:
            continue
        weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        theirs = transformers_model(vision, embed_dim, quick_gelu, weights)
        features[f"transformers/{name}/image"] = theirs.get_image_features(pixel_values=image).pooler_output.numpy()
        features[f"transformers/{name}/text"] = theirs.get_text_features(input_ids=text).pooler_output.numpy()
    np.savez(OUT, **features)
    versions = f"open_clip {open_clip.__version__}, transformers {transformers.__version__}"
    print(f"wrote {OUT.name}: {len(features)} features from {versions}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
