"""A text encoder of transformers as the text tower: RoBERTa, XLM-RoBERTa, NLLB's and mT5's encoders, BERT.

Modules and names are those of OpenCLIP's HFTextEncoder: `transformer`, and `proj` behind it. transformers is imported
when such a tower is built, and only then.
"""

import importlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diptych.errors import UsageError, install
from diptych.model.architectures import read_architecture
from diptych.model.config import TransformersTextConfig

_SAME_AS = {"chinese_clip_text_model": "bert", "altclip_text_model": "xlm-roberta"}
_NO_DECODER = {"m2m_100": {"decoder_layers": 0}, "mt5": {"num_decoder_layers": 0}}


class TransformersText(nn.Module):
    """Tokens [N, L] -> text features [N, E], not normalised. L may be anything up to `context_length`."""

    def __init__(self, config: TransformersTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        self.length_multiple = 1  # a compiled tower is given few lengths, each compiled once
        self.transformer = _build(config)
        self.proj = _build_projection(config, embed_dim)

    def forward(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
        """Padding is not seen, and what is padding in every text is not computed."""
        if text.shape[1] > self.context_length:
            raise UsageError(f"texts of {text.shape[1]} tokens do not fit; the text tower takes {self.context_length}")
        if not len(text):
            return self.proj(next(self.parameters()).new_zeros(0, self.config.width))
        longest = int(find_lengths(text, self.config.pad_id).max())
        return self.encode(text[:, : -(-longest // self.length_multiple) * self.length_multiple])

    def encode(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
        """Every token, padding too."""
        seen = text != self.config.pad_id
        output = self.transformer(input_ids=text, attention_mask=seen.long())
        return self.proj(self.pool(output, seen))

    def pool(self, output: Any, seen: Bool[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """The encoder's output -> one vector a text."""
        if self.config.pool == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state
        if self.config.pool == "class":
            return tokens[:, 0]
        return (tokens * seen.unsqueeze(-1)).sum(dim=1) / seen.sum(dim=-1, keepdim=True)


def find_lengths(text: Int[Tensor, "N L"], pad_id: int) -> Int[Tensor, " N"]:
    """Tokens of each text, padding behind it left out; at least one."""
    places = torch.arange(1, text.shape[1] + 1, device=text.device)
    return ((text != pad_id) * places).amax(dim=1).clamp(min=1)


def _build(config: TransformersTextConfig) -> nn.Module:
    transformers = import_transformers()
    settings = dict(read_architecture(config.architecture))
    settings.pop("project_dim", None)
    kind = str(settings.pop("model_type"))
    kind = _SAME_AS.get(kind, kind)
    try:
        described = transformers.AutoConfig.for_model(kind, **settings, **_NO_DECODER.get(kind, {}))
        if kind in _NO_DECODER:
            return transformers.AutoModel.from_config(described).encoder
        return transformers.AutoModel.from_config(described, add_pooling_layer=config.pool == "pooler")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"transformers cannot build a {kind} as described: {str(error)[:200]}") from None


def import_transformers() -> Any:
    """transformers; UsageError, which names the extra, if it cannot be imported."""
    try:
        return importlib.import_module("transformers")
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"transformers cannot be imported ({error}); {install('transformers')}") from None


def _build_projection(config: TransformersTextConfig, embed_dim: int) -> nn.Module:
    width, settings = config.width, read_architecture(config.architecture)
    match config.projection:
        case "none":
            return nn.Identity()
        case "linear":
            return nn.Linear(width, embed_dim, bias=False)
        case "mlp":
            hidden = (width + embed_dim) // 2
            return nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
            )
        case "teacher":
            hidden = settings["project_dim"]
            norm = nn.LayerNorm(width, settings["layer_norm_eps"])
            return nn.Sequential(norm, nn.Linear(width, hidden), nn.Linear(hidden, embed_dim, bias=False))
