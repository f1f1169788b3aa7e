"""Write src/diptych/assets/published.json: every image-text model that open_clip names, from its own tables.

.venv-peers/bin/python tests/golden/make_published.py     (PYTHONPATH may name the src/ of a newer open_clip)

Read from the installed open_clip: weights and preprocessing (`pretrained.py`), architectures (`model_configs/`);
counted: parameters, on the meta device. Families, languages and licences stand below, since no table there has them.
Names and hashes of OpenAI's own files are kept from the table as it is.
"""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import _PRETRAINED

TABLE = Path(__file__).resolve().parents[2] / "src" / "diptych" / "assets" / "published.json"
USUAL = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

FAMILIES: list[tuple[str, str, int, str | None]] = [
    # a word of NAME/tag: family, languages of its captions (at least), licence. The first that fits.
    ("-SigLIP2", "SigLIP 2", 109, "apache-2.0"),
    ("-SigLIP-i18n", "SigLIP", 109, "apache-2.0"),
    ("nllb-clip", "NLLB-CLIP", 201, "cc-by-nc-4.0"),
    ("-SigLIP", "SigLIP", 1, "apache-2.0"),
    ("metaclip2", "MetaCLIP 2", 300, "cc-by-nc-4.0"),
    ("metaclip", "MetaCLIP", 1, "cc-by-nc-4.0"),
    ("-CLIPA", "CLIPA", 1, "apache-2.0"),
    ("PE-Core", "PE-Core", 1, "apache-2.0"),
    ("MobileCLIP2", "MobileCLIP 2", 1, "apple-amlr"),
    ("MobileCLIP", "MobileCLIP", 1, "apple-amlr"),
    ("coca_", "CoCa", 1, "mit"),
    ("xlm-roberta", "XLM-RoBERTa", 100, "mit"),
    ("roberta", "RoBERTa", 1, "mit"),
    ("convnext", "ConvNeXt", 1, "mit"),
    ("EVA0", "EVA-CLIP", 1, "mit"),
    ("ViTamin", "ViTamin", 1, "mit"),
    ("/dfn", "DFN", 1, None),
    ("/openai", "OpenAI", 1, "mit"),
    ("/datacomp", "DataComp", 1, "mit"),
    ("/commonpool", "CommonPool", 1, "mit"),
    ("/", "OpenCLIP", 1, "mit"),
]


def text_config(name: str, *_: Any, **__: Any) -> transformers.PretrainedConfig:
    """The sizes of the text towers that open_clip asks the hub for."""
    nllb = {"vocab_size": 256206, "d_model": 1024, "encoder_attention_heads": 16, "decoder_layers": 1}
    return {
        "roberta-base": lambda: transformers.RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
        ),
        "xlm-roberta-base": lambda: transformers.XLMRobertaConfig(
            vocab_size=250002, max_position_embeddings=514, type_vocab_size=1
        ),
        "xlm-roberta-large": lambda: transformers.XLMRobertaConfig(
            vocab_size=250002, max_position_embeddings=514, type_vocab_size=1,
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        ),
        "facebook/nllb-200-distilled-600M": lambda: transformers.M2M100Config(
            **nllb, encoder_layers=12, encoder_ffn_dim=4096
        ),
        "facebook/nllb-200-distilled-1.3B": lambda: transformers.M2M100Config(
            **nllb, encoder_layers=24, encoder_ffn_dim=8192
        ),
    }[name]()  # fmt: skip


def count_parameters(architecture: str) -> int:
    """Numbers of the whole model, a CoCa's decoder too."""
    with torch.device("meta"):
        model = open_clip.create_model(architecture, device="meta", pretrained_hf=False)
    return sum(parameter.numel() for parameter in model.parameters())


def describe(architecture: str, tag: str, config: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """One line of the table; what is as usual is left out."""
    family, languages, licence = next(facts for word, *facts in FAMILIES if word in f"{architecture}/{tag}")
    repository, _, file = config["hf_hub"].rpartition("/")
    entry: dict[str, Any] = {"repository": repository}
    if file:
        entry["weights"] = file
    if tag.endswith("e32") and repository.endswith("e31"):  # open_clip's slip: the repository of other weights
        entry = {"url": config["url"]}
    quick = config.get("quick_gelu", open_clip.get_model_config(architecture).get("quick_gelu", False))
    entry |= {"activation": "quick_gelu" if quick else "gelu", "family": family, "licence": licence}
    if languages > 1:
        entry["languages"] = languages
    for theirs, ours in {
        "mean": "mean",
        "std": "std",
        "interpolation": "interpolation",
        "resize_mode": "resize",
    }.items():
        value = list(config[theirs]) if isinstance(config[theirs], tuple) else config[theirs]
        if value != USUAL[theirs]:
            entry[ours] = value
    if "mlfoundations" in config["url"]:
        name = config["url"].rsplit("/", 1)[1]
        entry["file"] = {"name": name, "sha256": name.rsplit(".", 1)[0].rsplit("-", 1)[1]}
    elif "file" in before:
        entry["file"] = before["file"]
    return entry


def main() -> None:
    transformers.AutoConfig.from_pretrained = text_config
    table = json.loads(TABLE.read_text())
    before = table.get("weights", table)
    architectures, weights = {}, {}
    for architecture, tags in sorted(_PRETRAINED.items()):
        if architecture.endswith("-quickgelu") or architecture.startswith("CLAP"):  # other names of the same; sounds
            continue
        print(architecture, flush=True)
        config = open_clip.get_model_config(architecture)
        architectures[architecture] = {"parameters": count_parameters(architecture), "model_cfg": config}
        for tag, facts in sorted(tags.items()):
            name = f"{architecture}/{tag}"
            weights[name] = describe(architecture, tag, facts, before.get(name, {}))

    def lines(section: dict[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in section.items())

    made_by = json.dumps(f"open_clip {open_clip.__version__}, tests/golden/make_published.py")
    TABLE.write_text(
        f'{{\n  "made_by": {made_by},\n  "architectures": {{\n{lines(architectures)}\n  }},\n'
        f'  "weights": {{\n{lines(weights)}\n  }}\n}}\n'
    )
    print(f"{len(architectures)} architectures, {len(weights)} weights")


if __name__ == "__main__":
    main()
