"""Low-rank additions to the Linear layers (LoRA, Hu et al. 2021), by `peft`.

`inject` changes a CLIP in place: a Linear becomes peft's, which holds the old one (`base_layer`) and two thin
matrices. Queries, keys and values of our attention are one Linear, `in_proj`, and so share one addition: its `lora_A`
is common to the three, its `lora_B` has rows for each. What is evaluated and saved as the model is `merged`, an
ordinary CLIP; what a run goes on from are the parts (`parts`), since adding up rounds.

peft is imported when it is used, and only then.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych import files
from diptych.checkpoint.loaded import rebuild
from diptych.checkpoint.weights.write import save_tensors
from diptych.errors import UsageError, install
from diptych.model.clip import CLIP
from diptych.train.config import StartConfig

ADAPTER = "adapter"
"""The folder in a run's folder that `peft.PeftModel.from_pretrained` reads."""
_PREFIX, _BASE, _NAME = "adapter.", ".base_layer.", "default"


def inject(model: CLIP, start: StartConfig, seed: int) -> None:
    """Add the matrices to the unlocked towers; they and the temperature are what is trained from now on."""
    peft = _import_peft()
    config = _peft_config(peft, model, start)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name in ("logit_scale", "logit_bias"))


def require_peft() -> None:
    """Raise UsageError if peft is not installed."""
    _import_peft()


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(f"--lora-rank needs peft, which is not installed: {install('lora')}") from None
    return peft


def _peft_config(peft: Any, model: CLIP, start: StartConfig) -> Any:
    towers = {"visual": start.lock != "image", "text": start.lock != "text"}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and towers[name.partition(".")[0]]
    ]
    alpha = start.lora_alpha if start.lora_alpha is not None else start.lora_rank
    return peft.LoraConfig(r=start.lora_rank, lora_alpha=alpha, target_modules=targets, bias="none")


def merged(model: CLIP) -> CLIP:
    """The ordinary model that a model with additions computes, as a new one in the same mode."""
    state: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        if not name.endswith(f"{_BASE}weight"):
            state[name.replace(_BASE, ".")] = tensor
            continue
        layer: Any = modules[name.removesuffix(f"{_BASE}weight")]
        state[name.replace(_BASE, ".")] = tensor + layer.get_delta_weight(_NAME)
    return rebuild(model.config, {name: tensor.detach() for name, tensor in state.items()}).train(model.training)


def parts(model: CLIP) -> dict[str, Tensor]:
    """Every tensor that `merged` does not show as it is, to be stored beside the optimizer's."""
    names = {name for name in model.state_dict() if _is_part(name)}
    return {f"{_PREFIX}{name}": tensor for name, tensor in model.state_dict().items() if name in names}


def restored(model: CLIP, weights: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model with additions, from a checkpoint's merged weights and its `parts`."""
    return {
        name: training[f"{_PREFIX}{name}"] if _is_part(name) else weights[name.replace(_BASE, ".")]
        for name in model.state_dict()
    }


def _is_part(name: str) -> bool:
    return ".lora_" in name or name.endswith(f"{_BASE}weight")


def save(model: CLIP, start: StartConfig, start_model: str, folder: Path) -> None:
    """Write the additions alone, as peft reads them; an older folder is replaced whole."""
    peft = _import_peft()
    state = peft.get_peft_model_state_dict(model, adapter_name=_NAME)
    whole = merged(model)  # whose modules have the names that the targets are to be found by
    config = _peft_config(peft, whole, start)
    config.base_model_name_or_path, config.inference_mode = start_model, True
    config.target_modules = sorted(config.target_modules)  # a set, whose order is another one in every process
    with files.atomic_folder(folder) as temporary:
        save_tensors(
            {f"base_model.model.{name}": tensor for name, tensor in state.items()},
            temporary / "adapter_model.safetensors",
            {"format": "pt"},
        )
        config.save_pretrained(str(temporary))
