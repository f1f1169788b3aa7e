"""Seconds from a command to its answer: one picture, two labels, ViT-B-32 weights on disk, the whole process.

    .venv/bin/python benchmarks/first_answer.py [rounds]            (make bench NAME=first_answer)

`diptych classify` beside the few lines that open_clip's README and transformers' page of the model show. Weights are
the same, random, in each library's own layout; files lie in the system's cache after the first round.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

ROUNDS = 7
MODEL = "ViT-B-32-quickgelu"
OPEN_CLIP = """
import sys, torch, open_clip
from PIL import Image
picture, folder = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(
    "ViT-B-32-quickgelu", pretrained=folder + "/open_clip/open_clip_model.safetensors")
model.eval()
tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(picture)).unsqueeze(0), normalize=True)
    text = model.encode_text(tokenizer(["a photo of a cat.", "a photo of a dog."]), normalize=True)
    print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))
"""
TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
picture, folder = sys.argv[1:]
model = CLIPModel.from_pretrained(folder + "/transformers")
processor = CLIPProcessor.from_pretrained(folder + "/transformers")
inputs = processor(
    text=["a photo of a cat.", "a photo of a dog."], images=Image.open(picture), return_tensors="pt", padding=True)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
"""


def main() -> None:
    harness.require_peers()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        folder, picture = Path(name), Path(name) / "one.jpg"
        draw(picture)
        subprocess.run(
            [harness.PEERS_PYTHON, harness.ROOT / "benchmarks" / "embed.py", "prepare", folder, MODEL], check=True
        )
        subprocess.run([sys.executable, harness.ROOT / "benchmarks" / "embed.py", "convert", folder], check=True)
        labels = ["--labels", "cat", "dog"]
        commands = {
            "ours": [sys.executable, "-m", "diptych", "classify", picture, *labels, "--model", folder / "open_clip"],
            "open_clip": [harness.PEERS_PYTHON, "-c", OPEN_CLIP, picture, folder],
            "transformers": [harness.PEERS_PYTHON, "-c", TRANSFORMERS, picture, folder],
        }
        values: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(rounds + 1):
            for who, command in commands.items():
                seconds = seconds_of(command)
                if turn:  # the first reads the files into the system's cache
                    values[who].append(seconds)
    done = harness.Rounds(values, {})
    harness.report(
        "first_answer", [done.row("first answer ViT-B-32", "s", peer) for peer in ("open_clip", "transformers")]
    )


def draw(path: Path) -> None:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((500, 375)).save(path, quality=90)


def seconds_of(command: list[str | Path]) -> float:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if command[0] == sys.executable:
        env = {**env, "PYTHONPATH": str(harness.ROOT / "src")}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
