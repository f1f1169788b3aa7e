"""Features of small models of later families, as open_clip and timm compute them.

    .venv-peers/bin/python tests/golden/make_families.py        writes tests/fixtures/families.npz

Weights and inputs come from `weights.py`; only the features are stored.
"""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from families import FAMILIES, TIMM, end_texts
from open_clip import timm_model
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from weights import fill, inputs

OUT = Path(__file__).parents[1] / "fixtures" / "families.npz"


class SmallTimm:
    """timm, whose models are made small."""

    @staticmethod
    def create_model(name: str, **given: Any) -> torch.nn.Module:
        return timm.create_model(name, **given, **TIMM[name])


def build(config: dict[str, Any]) -> torch.nn.Module:
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    bias = config.get("init_logit_bias")
    model = CustomTextCLIP(config["embed_dim"], vision, text, init_logit_bias=bias)
    weights = fill({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in weights.items()}, strict=False)
    return model.eval()


@torch.inference_mode()
def main() -> None:
    timm_model.timm = SmallTimm
    features = {}
    for name, config in FAMILIES.items():
        model, text_config = build(config), config["text_cfg"]
        image, text = inputs(
            config["vision_cfg"]["image_size"], text_config["context_length"], text_config["vocab_size"]
        )
        text = end_texts(text, text_config)
        features[f"{name}/image"] = model.encode_image(torch.from_numpy(image)).numpy()
        features[f"{name}/text"] = model.encode_text(torch.from_numpy(text)).numpy()
    np.savez(OUT, **features)
    print(f"wrote {OUT.name}: {len(features)} features from open_clip {open_clip.__version__}, timm {timm.__version__}")


if __name__ == "__main__":
    main()
