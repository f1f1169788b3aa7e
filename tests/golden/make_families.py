"""Features of small models of later families, as open_clip and timm compute them.

    .venv-peers/bin/python tests/golden/make_families.py        writes tests/fixtures/families.npz

Weights and inputs come from `weights.py`; only the features are stored.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import open_clip
import timm
import torch
import transformers
from families import ENCODERS, FAMILIES, FOREIGN, TIMM, end_texts
from open_clip import hf_model, timm_model
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from weights import fill, inputs

OUT = Path(__file__).parents[1] / "fixtures" / "families.npz"


class SmallTimm:
    """timm, whose models are made small."""

    sizes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def create_model(cls, name: str, **given: Any) -> torch.nn.Module:
        return timm.create_model(name, **given, **(cls.sizes or TIMM[name]))


def describe(name: str) -> transformers.PreTrainedConfig:
    """The small encoder that has a larger one's name."""
    return transformers.AutoConfig.for_model(**ENCODERS[name])


def build(config: dict[str, Any]) -> torch.nn.Module:
    tower = dict(config["vision_cfg"])
    SmallTimm.sizes = tower.pop("timm_model_kwargs", {})
    vision, text = CLIPVisionCfg(**tower), CLIPTextCfg(**config["text_cfg"])
    bias = config.get("init_logit_bias")
    model = CustomTextCLIP(config["embed_dim"], vision, text, init_logit_bias=bias)
    weights = fill({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in weights.items()}, strict=False)
    return model.eval()


@torch.inference_mode()
def main() -> None:
    timm_model.timm = SmallTimm
    hf_model.AutoConfig = SimpleNamespace(from_pretrained=describe)
    features = {}
    for name, config in (FAMILIES | FOREIGN).items():
        model, text_config = build(config), config["text_cfg"]
        if encoder := text_config.get("hf_model_name"):
            settings = describe(encoder)
            text_config = {**text_config, "vocab_size": settings.vocab_size, "pad_id": settings.pad_token_id}
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
