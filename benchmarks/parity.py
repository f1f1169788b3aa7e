"""Every layout in both directions: features of the library that wrote a checkpoint beside those of its reader.

    python benchmarks/parity.py [CASE ...]          (make parity)

The nine architectures of the paper, ViT-B-32 and RN50 at full size, the others as twins of the same depth, patch and
picture and 64 channels a head, but narrow; and twins of larger OpenCLIP models with other heads, other MLPs and GELU.

theirs -> ours: open_clip writes a hub folder, transformers a CLIPModel folder, torch.jit traces open_clip's CLIP into
an archive as OpenAI released them; each writer also leaves its own features. We load all of them.
ours -> theirs: we write every layout that can hold the model, and open_clip and transformers load it strictly.

`ours` is the largest distance between two features, relative to their length, `peer` the bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import PEERS_PYTHON, ROOT, report, require_peers

BOUND = 1e-5


def vit(width: int, layers: int, patch: int, size: int, **more: Any) -> dict[str, Any]:
    return {"width": width, "layers": layers, "patch_size": patch, "image_size": size, **more}


def resnet(width: int, layers: list[int], size: int) -> dict[str, Any]:
    return {"width": width, "layers": layers, "patch_size": None, "image_size": size}


def text(width: int, layers: int = 12, heads: int | None = None) -> dict[str, Any]:
    return {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads or width // 64, "layers": layers}


CASES: dict[str, dict[str, Any]] = {
    # open_clip's model_cfg of each
    "ViT-B-32": {"embed_dim": 512, "vision_cfg": vit(768, 12, 32, 224), "text_cfg": text(512)},
    "RN50": {"embed_dim": 1024, "vision_cfg": resnet(64, [3, 4, 6, 3], 224), "text_cfg": text(512)},
    "ViT-B-16 narrow": {"embed_dim": 128, "vision_cfg": vit(192, 12, 16, 224), "text_cfg": text(128)},
    "ViT-L-14 narrow": {"embed_dim": 128, "vision_cfg": vit(128, 24, 14, 224), "text_cfg": text(128)},
    "ViT-L-14-336 narrow": {"embed_dim": 128, "vision_cfg": vit(128, 24, 14, 336), "text_cfg": text(128)},
    "RN101 narrow": {"embed_dim": 96, "vision_cfg": resnet(16, [3, 4, 23, 3], 224), "text_cfg": text(128)},
    "RN50x4 narrow": {"embed_dim": 96, "vision_cfg": resnet(20, [4, 6, 10, 6], 288), "text_cfg": text(128)},
    "RN50x16 narrow": {"embed_dim": 96, "vision_cfg": resnet(16, [6, 8, 18, 8], 384), "text_cfg": text(128)},
    "RN50x64 narrow": {"embed_dim": 96, "vision_cfg": resnet(16, [3, 15, 36, 10], 448), "text_cfg": text(128)},
    "ViT-H-14 narrow, GELU": {
        "embed_dim": 128,
        "vision_cfg": vit(160, 32, 14, 224, head_width=80),
        "text_cfg": text(128, 24),
        "quick_gelu": False,
    },
    "ViT-g-14 narrow, GELU": {
        "embed_dim": 128,
        "vision_cfg": vit(176, 40, 14, 224, head_width=88, mlp_ratio=4.3637),
        "text_cfg": text(128, 24),
        "quick_gelu": False,
    },
    "ViT-bigG-14 narrow": {
        "embed_dim": 160,
        "vision_cfg": vit(208, 48, 14, 224, head_width=104, mlp_ratio=4.9231),
        "text_cfg": text(192, 32, 6),
    },
}


RESIZED = {"ViT-B-16 narrow": 288, "ViT-L-14 narrow": 140}
"""Cases whose position embeddings are also resized, and the side of the pictures then."""


def resized_picture(case: str) -> torch.Tensor:
    size = RESIZED[case]
    return torch.from_numpy(np.random.default_rng(size).standard_normal((2, 3, size, size)).astype(np.float32))


def inputs(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures [2, 3, H, W], and texts [3, 77] of 2, 9 and 77 tokens."""
    draw = np.random.default_rng(len(case))
    size = CASES[case]["vision_cfg"]["image_size"]
    ids = np.zeros((3, 77), dtype=np.int64)
    for row, length in zip(ids, (2, 9, 77), strict=True):
        row[:length] = draw.integers(1, 49406, length)
        row[0], row[length - 1] = 49406, 49407
    return torch.from_numpy(draw.standard_normal((2, 3, size, size)).astype(np.float32)), torch.from_numpy(ids)


def is_quick(case: str) -> bool:
    return CASES[case].get("quick_gelu", True)


def is_vit(case: str) -> bool:
    return CASES[case]["vision_cfg"]["patch_size"] is not None


# --- the peers' side -------------------------------------------------------------------------------------------------


def store(folder: Path, image: torch.Tensor, text: torch.Tensor) -> None:
    np.savez(folder / "features.npz", image=image.numpy(), text=text.numpy())


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random and of a size that keeps features alive: gains, biases and BatchNorm statistics too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("logit_scale") or not tensor.is_floating_point():
                continue
            elif tensor.ndim == 1:
                gain = 1.0 if name.endswith("weight") else 0.0  # LayerNorm and BatchNorm
                tensor.normal_(gain, 0.1, generator=generator)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    return model.eval()


class NoTokenizer:
    """What open_clip's writer wants beside the model; its default tokenizer is meant."""

    def save_pretrained(self, folder: Path) -> None: ...


@torch.inference_mode()
def peers_write(root: Path, cases: list[str]) -> None:
    import open_clip  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from open_clip.push_to_hf_hub import save_for_hf  # pyright: ignore[reportMissingImports]

    for number, case in enumerate(cases):
        image, ids = inputs(case)
        config = {**CASES[case], "quick_gelu": is_quick(case)}
        vision, tower = open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"])
        folder = root / "theirs" / str(number)
        for kind in ("open_clip", "torchscript", "transformers"):
            (folder / kind).mkdir(parents=True)
        (folder / f"parity-{number}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"parity-{number}.json")
        model: Any = randomize(open_clip.create_model(f"parity-{number}"))
        save_for_hf(model, NoTokenizer(), config, folder / "open_clip", safe_serialization=True)
        features = model.encode_image(image), model.encode_text(ids)
        store(folder / "open_clip", *features)
        with torch.enable_grad():
            traced = torch.jit.trace_module(
                model, {"forward": (image, ids), "encode_image": (image,), "encode_text": (ids,)}, check_trace=False
            )
        traced.save(folder / "torchscript" / "model.pt")
        store(folder / "torchscript", *features)
        if not is_vit(case):
            continue
        act = {"hidden_act": "quick_gelu" if config["quick_gelu"] else "gelu"}
        clip: Any = transformers.CLIPModel(
            transformers.CLIPConfig(
                projection_dim=config["embed_dim"],
                text_config=act
                | {
                    "hidden_size": tower.width,
                    "intermediate_size": int(tower.width * tower.mlp_ratio),
                    "num_hidden_layers": tower.layers,
                    "num_attention_heads": tower.heads,
                },
                vision_config=act
                | {
                    "hidden_size": vision.width,
                    "intermediate_size": int(vision.width * vision.mlp_ratio),
                    "num_hidden_layers": vision.layers,
                    "num_attention_heads": vision.width // vision.head_width,
                    "image_size": vision.image_size,
                    "patch_size": vision.patch_size,
                },
            )
        )
        randomize(clip)
        clip.save_pretrained(folder / "transformers")
        store(folder / "transformers", *hf_features(clip, image, ids))
        if case in RESIZED:
            large = resized_picture(case)
            options = {"pretrained": str(folder / "open_clip" / "open_clip_model.safetensors")}
            resized: Any = open_clip.create_model(f"parity-{number}", force_image_size=RESIZED[case], **options)
            theirs = clip.get_image_features(pixel_values=large, interpolate_pos_encoding=True).pooler_output
            np.savez(folder / "resized.npz", open_clip=resized.eval().encode_image(large), transformers=theirs)
    print(json.dumps({"open_clip": open_clip.__version__, "transformers": transformers.__version__}))


def hf_features(clip: Any, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    image_features = clip.get_image_features(pixel_values=image).pooler_output
    return image_features, clip.get_text_features(input_ids=text).pooler_output


@torch.inference_mode()
def peers_read(root: Path, cases: list[str]) -> None:
    import open_clip  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    for number, case in enumerate(cases):
        image, text = inputs(case)
        for place in sorted((root / "ours" / str(number)).iterdir()):
            if place.name == "open_clip":
                model = open_clip.create_model(f"local-dir:{place}")
                model.load_state_dict(load_file(place / "open_clip_model.safetensors"), strict=True)
                model.eval()
            elif place.name == "openai":
                model = open_clip.load_openai_model(str(place / "model.pt"), device="cpu").float().eval()
                model.load_state_dict(torch.load(place / "model.pt", weights_only=True), strict=True)  # it had rounded
            elif place.name == "transformers":
                model, info = transformers.CLIPModel.from_pretrained(place, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
                problems = {kind: names for kind, names in info.items() if names}
                assert not problems, problems
                store(place, *hf_features(model.eval(), image, text))
                continue
            else:
                continue
            store(place, model.encode_image(image), model.encode_text(text))


# --- our side --------------------------------------------------------------------------------------------------------


def ours_read(root: Path, cases: list[str]) -> Iterator[dict[str, Any]]:
    """Load what they wrote."""
    from diptych.checkpoint import layouts

    for number, case in enumerate(cases):
        for kind in ("open_clip", "torchscript", "transformers"):
            place = root / "theirs" / str(number) / kind
            if not (place / "features.npz").exists():
                continue
            odd_heads = (
                "head_width" in CASES[case]["vision_cfg"]
                or CASES[case]["text_cfg"]["heads"] * 64 != (CASES[case]["text_cfg"]["width"])
            )
            if kind == "torchscript" and odd_heads:
                continue  # an archive does not say how many heads it has; OpenAI's all have 64 channels each
            source = place / "model.pt" if kind == "torchscript" else place
            model = layouts.load(source).model
            yield row(f"{case}: {kind} -> diptych", kind, measure(model, case, place))
        if case in RESIZED:
            yield from ours_resized(root / "theirs" / str(number), case)


def ours_resized(folder: Path, case: str) -> Iterator[dict[str, Any]]:
    """Position embeddings resized as either library does it, from the checkpoint that it wrote."""
    from diptych.checkpoint import layouts, surgery

    theirs = np.load(folder / "resized.npz")
    for kind in ("open_clip", "transformers"):
        loaded = surgery.resize_image(layouts.load(folder / kind), RESIZED[case], kind)
        with torch.inference_mode():
            error = distance(loaded.model.encode_image(resized_picture(case)), torch.from_numpy(theirs[kind]))
        yield row(f"{case}: resized to {RESIZED[case]} px as {kind}", kind, error)


def ours_write(root: Path, cases: list[str]) -> None:
    """Random models of ours in every layout that can hold them; features of ours beside."""
    from diptych.checkpoint import layouts
    from diptych.checkpoint.loaded import Loaded

    for number in range(len(cases)):
        loaded = layouts.load(root / "theirs" / str(number) / "open_clip")
        loaded = Loaded(randomize(loaded.model), *loaded[1:])  # pyright: ignore[reportArgumentType]
        for name in ("open_clip", "transformers", "openai"):
            place = root / "ours" / str(number) / name
            if layouts.LAYOUTS[name].why_not(loaded) is None:
                layouts.save(loaded, place / "model.pt" if name == "openai" else place, name)
        layouts.save(loaded, root / "ours" / str(number) / "diptych")


def ours_compare(root: Path, cases: list[str]) -> Iterator[dict[str, Any]]:
    from diptych.checkpoint import layouts

    for number, case in enumerate(cases):
        model = layouts.load(root / "ours" / str(number) / "diptych").model
        for place in sorted((root / "ours" / str(number)).iterdir()):
            if (place / "features.npz").exists():
                reader = "transformers" if place.name == "transformers" else "open_clip"
                yield row(f"{case}: diptych -> {place.name}", reader, measure(model, case, place))


@torch.inference_mode()
def measure(model: Any, case: str, place: Path) -> float:
    """The larger of both towers' distances."""
    theirs = np.load(place / "features.npz")
    image, text = inputs(case)
    distances = []
    for ours, name in ((model.encode_image(image), "image"), (model.encode_text(text), "text")):
        distances.append(distance(ours, torch.from_numpy(theirs[name])))
    return max(distances)


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def row(case: str, peer: str, error: float) -> dict[str, Any]:
    print(f"{case}: {error:.1e}", flush=True)
    ratio = BOUND / max(error, 1e-12)
    return {"case": case, "ours": error, "peer": BOUND, "peer_name": f"bound ({peer})", "unit": "error", "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="some of the cases; by default all")
    cases = parser.parse_args().cases or list(CASES)
    require_peers()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        versions = peers("write", root, cases)
        rows = list(ours_read(root, cases))
        ours_write(root, cases)
        peers("read", root, cases)
        rows += ours_compare(root, cases)
    if cases == list(CASES):
        report("parity", rows, versions=json.loads(versions), torch=torch.__version__)
    bad = [row["case"] for row in rows if not row["ours"] <= BOUND]
    print(f"{len(rows) - len(bad)} of {len(rows)} within {BOUND:.0e}" + (f"; not: {', '.join(bad)}" if bad else ""))
    sys.exit(bool(bad))


def peers(step: str, root: Path, cases: list[str]) -> str:
    """Run one of the peers' steps in their environment; the last line it prints."""
    command = [PEERS_PYTHON, __file__, f"--peers-{step}", root, *cases]
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **quiet}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    return (done.stdout.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peers-write"]:
        peers_write(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == ["--peers-read"]:
        peers_read(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
