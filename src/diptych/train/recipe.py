"""Whole sets of training values by name. A variant of one is `dataclasses.replace`."""

from dataclasses import dataclass, field

from diptych.errors import UsageError, unknown_name
from diptych.model.config import PAPER_PRESETS, ViTConfig
from diptych.shards.config import LoaderConfig
from diptych.train.config import LossConfig, OptimConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained, whatever the model, the data and the place."""

    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


PAPER_RATES: dict[str, float] = {
    # Peak learning rates of Tables 19 and 20.
    "RN50": 5e-4,
    "RN101": 5e-4,
    "RN50x4": 5e-4,
    "RN50x16": 4e-4,
    "RN50x64": 3.6e-4,
    "ViT-B-32": 5e-4,
    "ViT-B-16": 5e-4,
    "ViT-L-14": 4e-4,
    "ViT-L-14-336": 2e-5,
}
CONTINUED = {"ViT-L-14-336": "ViT-L-14"}
"""Trained from the weights of another, for one more epoch at a larger picture (section 2.5)."""


def _paper(name: str) -> Recipe:
    """Table 18 and section 2.5. Their half precision is bfloat16 here, which needs no loss scaling."""
    is_vit = isinstance(PAPER_PRESETS[name].vision, ViTConfig)
    return Recipe(
        loader=LoaderConfig(batch_size=32_768),
        optim=OptimConfig(
            lr=PAPER_RATES[name],
            warmup=2000,
            weight_decay=0.2,
            beta1=0.9,
            beta2=0.98 if is_vit else 0.999,
            eps=1e-6 if is_vit else 1e-8,
            half_statistics=True,
        ),
        run=RunConfig(epochs=1.0 if name in CONTINUED else 32.0, precision="bfloat16", recompute=True),
    )


PAPER: dict[str, Recipe] = {name: _paper(name) for name in PAPER_RATES}
"""Settings of the paper's nine models, from Tables 18 to 20 and section 2.5."""

SMALL_DATA = Recipe(
    loader=LoaderConfig(batch_size=256),
    optim=OptimConfig(lr=2e-3, warmup=50, beta2=0.98, eps=1e-6),
    run=RunConfig(epochs=8.5),
)
"""For some ten thousand pairs and a small model: what `make demo` trains 15,000 with, whose outcome README.md shows."""

FINETUNE = Recipe(
    optim=OptimConfig(lr=1e-5, warmup=500, weight_decay=0.1, beta2=0.999, eps=1e-8, max_grad_norm=1.0),
    run=RunConfig(epochs=10.0),
)
"""Defaults of `diptych finetune`. Rate, weight decay, warm-up, epochs: FLYP's (Goyal et al. 2023), which
fine-tunes CLIP with its own loss. Length of gradients: WiSE-FT's code (Wortsman et al. 2022). beta2 and eps: AdamW's
own, as in both. docs/finetune.md gives a reason for each, the batch size and patch dropout too."""

NAMES = ("paper", "small-data")


def get_recipe(name: str, preset: str) -> Recipe:
    """Look a recipe up by name, for one of the architectures; raises UsageError."""
    match name:
        case "small-data":
            return SMALL_DATA
        case "paper" if preset in PAPER:
            return PAPER[preset]
        case "paper":
            raise UsageError(f"the paper did not train {preset}; its recipe is for {', '.join(PAPER)}")
    raise unknown_name("recipe", name, NAMES)
