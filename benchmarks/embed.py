"""The image tower beside its peers: pictures per second in batches of 32, and milliseconds for one picture.

    .venv/bin/python benchmarks/embed.py [--rounds 7] [--pictures FOLDER]            (make bench NAME=embed)

The same random weights for all: open_clip makes them; transformers, ONNX Runtime and OpenVINO are given what
`diptych convert` makes of them. All use all cores. We are given bytes of pixels and normalise them, the peers are given
what they need: normalised pixels in their type. Batches are computed as `diptych embed` computes many: two at the same
time on two cores. --pictures names a folder of real pictures (JPEG, PNG) whose features in each precision are held
against the exact ones; without it pictures are drawn. RN50 and ViT-L-14 follow.
"""

# pyright: reportMissingImports=false

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from embed_folder import write_pictures
from parity import NoTokenizer

ROUNDS = 7
SIZES = {"ViT-B-32-quickgelu": 32, "RN50-quickgelu": 32, "ViT-L-14-quickgelu": 4}
"""Pictures in a batch, by open_clip's name."""
COSINES = 300
"""Pictures whose features are compared."""


def prepare(folder: Path, model: str) -> None:
    """In the peers' environment: weights, in open_clip's layout."""
    import open_clip
    import torch
    from open_clip.push_to_hf_hub import save_for_hf

    torch.manual_seed(0)
    config = open_clip.get_model_config(model)
    save_for_hf(open_clip.create_model(model), NoTokenizer(), config, folder / "open_clip", safe_serialization=True)


def convert(folder: Path) -> None:
    """In ours: the same weights for the other peers."""
    from diptych.checkpoint.formats import onnx
    from diptych.checkpoint.layouts import load, save

    loaded = load(folder / "open_clip")
    save(loaded, folder / "transformers", "transformers")
    (folder / "onnx").mkdir()
    onnx.export(loaded.model, folder / "onnx")


def figures(encode: Callable[[int], Any], size: int) -> Callable[[], dict[str, float]]:
    """Time `encode(count)`, which computes that many pictures, in batches of `size` if it is more."""

    def measure() -> dict[str, float]:
        started = time.perf_counter()
        encode(2 * size)
        speed = 2 * size / (time.perf_counter() - started)
        times = []
        for _ in range(10 if size > 8 else 3):
            started = time.perf_counter()
            encode(1)
            times.append(time.perf_counter() - started)
        return {"speed": speed, "latency": 1000 * sorted(times)[len(times) // 2]}

    encode(size)
    encode(1)
    return measure


def work_ours(folder: Path, precision: Any, size: int) -> None:
    import torch

    from diptych.checkpoint.layouts import load
    from diptych.embed.images import ImageTower
    from diptych.embed.stream import compute_ahead

    loaded = load(folder / "open_clip")
    tower = ImageTower(loaded, precision)
    side = loaded.preprocess.image_size
    pixels = torch.randint(0, 256, (2 * size, 3, side, side), dtype=torch.uint8)

    def encode(count: int) -> None:
        if count <= size:
            tower.encode(pixels[:count])
        else:
            list(compute_ahead(tower.encode, pixels[:count].split(size), tower.streams))

    harness.answer(figures(encode, size), torch=torch.__version__)


def work_peer(folder: Path, model: str, peer: str, size: int) -> None:
    import torch

    side = 224
    encode_batch: Callable[[torch.Tensor], Any]
    kind, _, precision = peer.partition(" ")
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    context: Any = contextlib.nullcontext()
    if kind == "open_clip":
        import open_clip as module
        from safetensors.torch import load_file

        tower = module.create_model(model, precision="pure_bf16" if precision == "pure_bf16" else "fp32").eval()
        tower.load_state_dict(load_file(folder / "open_clip" / "open_clip_model.safetensors"))
        context = torch.autocast("cpu", torch.bfloat16) if precision == "amp_bf16" else context
        encode_batch = tower.encode_image
    elif kind == "transformers":
        import transformers as module

        tower = module.CLIPModel.from_pretrained(folder / "transformers").eval()
        encode_batch = lambda image: tower.get_image_features(pixel_values=image)  # noqa: E731
    elif kind == "onnxruntime":
        import onnxruntime as module
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = folder / "onnx" / "image.onnx"
        if precision == "int8":
            quantize_dynamic(path, path.with_name("int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)
            path = path.with_name("int8.onnx")
        session = module.InferenceSession(path, providers=["CPUExecutionProvider"])
        encode_batch = lambda image: session.run(None, {"image": image.numpy()})  # noqa: E731
    else:
        import openvino as module

        hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
        compiled = module.Core().compile_model(
            folder / "onnx" / "image.onnx", "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        )
        encode_batch = lambda image: compiled([image.numpy()])  # noqa: E731
    image = torch.randn(2 * size, 3, side, side).to(dtype)

    def encode(count: int) -> None:
        with torch.inference_mode(), context:
            for batch in image[:count].split(size):
                encode_batch(batch)

    harness.answer(figures(encode, size), torch=torch.__version__, **{kind: module.__version__})


def compare(folder: Path, pictures: Path) -> None:
    """Print the lowest cosine of each precision's features to the exact ones, as JSON."""
    import json

    import torch

    from diptych.checkpoint.layouts import load
    from diptych.embed.images import embed_images

    loaded = load(folder / "open_clip")
    paths = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:COSINES]
    exact = embed_images(loaded, paths, 32).double()
    lowest: dict[str, float] = {"pictures": len(paths)}
    for precision in ("float32", "bfloat16", "int8"):
        features = embed_images(loaded, paths, 32, precision=precision).double()
        lowest[precision] = torch.nn.functional.cosine_similarity(exact, features).min().item()
    print(json.dumps(lowest))


def run_model(folder: Path, model: str, rounds: int, ours: list[str], peers: list[str]) -> harness.Rounds:
    """Measure one architecture, all in turn."""
    subprocess.run([harness.PEERS_PYTHON, __file__, "prepare", folder, model], check=True)
    if any(not peer.startswith("open_clip") for peer in peers):
        subprocess.run([harness.OURS_PYTHON, __file__, "convert", folder], check=True, env=harness.ours_env())
    size = SIZES[model]
    contestants = [
        harness.Contestant(name, [harness.OURS_PYTHON, __file__, "ours", folder, name, str(size)]) for name in ours
    ]
    contestants += [
        harness.Contestant(peer, [harness.PEERS_PYTHON, __file__, "peer", folder, model, peer, str(size)])
        for peer in peers
    ]
    return harness.run_rounds(contestants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    harness.require_peers()
    rows, about, cosines = [], {}, ""
    peers = ["open_clip float32", "open_clip amp_bf16", "open_clip pure_bf16", "transformers float32"]
    peers += ["onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino bfloat16"]
    plans = {
        "ViT-B-32-quickgelu": (["bfloat16", "int8", "float32", "exact"], peers),
        "RN50-quickgelu": (["bfloat16"], ["open_clip float32", "open_clip pure_bf16"]),
        "ViT-L-14-quickgelu": (["bfloat16", "int8"], ["open_clip float32", "open_clip pure_bf16"]),
    }
    for model, (ours, theirs) in plans.items():
        with tempfile.TemporaryDirectory() as name:
            done = run_model(Path(name), model, options.rounds, ours, theirs)
            about |= {f"{model} {who}": value for who, value in done.about.items()}
            short = model.removesuffix("-quickgelu")
            for figure, unit, case in (
                ("speed", "pictures/s", f"image {short} batch {SIZES[model]}"),
                ("latency", "ms", f"latency {short}"),
            ):
                rows += [
                    done.pick(figure).row(f"{case} {precision}", unit, peer, ours=precision)
                    for precision in ours
                    for peer in theirs
                ]
            if short == "ViT-B-32":
                drawn = Path(name) / "pictures"
                if options.pictures is None:
                    drawn.mkdir()
                    write_pictures(drawn, COSINES)
                answer = subprocess.run(
                    [harness.OURS_PYTHON, __file__, "compare", name, options.pictures or drawn],
                    check=True, stdout=subprocess.PIPE, text=True, env=harness.ours_env(),
                )  # fmt: skip
                cosines = answer.stdout.strip()
                print(f"lowest cosine to exact features: {cosines}", flush=True)
    harness.report("embed", [*rows, *harness.matrix_rows(rounds=3)], lowest_cosine=cosines, about=about)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", folder, model]:
            prepare(Path(folder), model)
        case ["convert", folder]:
            convert(Path(folder))
        case ["ours", folder, precision, size]:
            work_ours(Path(folder), precision, int(size))
        case ["peer", folder, model, peer, size]:
            work_peer(Path(folder), model, peer, int(size))
        case ["compare", folder, pictures]:
            compare(Path(folder), Path(pictures))
        case _:
            main()
