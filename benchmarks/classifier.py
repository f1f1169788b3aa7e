"""ImageNet's zero-shot classifier: 1,000 class names in 80 templates, prompts per second on all cores.

    .venv/bin/python benchmarks/classifier.py            (make bench NAME=classifier)

ViT-B-32 with the same random weights on both sides: open_clip makes and saves them, we load them. open_clip's own
`build_zero_shot_classifier` runs as it comes (float32) and with `precision="pure_bf16"`; it computes 77 tokens a
prompt, so it is timed on a slice of the class names, prompts per second being the same for any. We build the whole
classifier once, and a slice of its names in each round; from a slice we gain less than from the whole, since fewer
names share a template. Class names are ImageNet's as open_clip has them.
"""

# pyright: reportMissingImports=false

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
from parity import NoTokenizer

MODEL = "ViT-B-32-quickgelu"
SLICES = {"bfloat16": 50, "exact": 20, "open_clip float32": 1, "open_clip pure_bf16": 2}
ROUNDS = 7


def prepare(folder: Path) -> None:
    """In the peers' environment: names, templates, weights."""
    import open_clip
    import torch
    from open_clip.push_to_hf_hub import save_for_hf

    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-B-32-quickgelu")
    save_for_hf(
        model,
        NoTokenizer(),
        open_clip.get_model_config("ViT-B-32-quickgelu"),
        folder / "model",
        safe_serialization=True,
    )
    (folder / "names.json").write_text(json.dumps(list(open_clip.IMAGENET_CLASSNAMES)))


def work_theirs(folder: Path, precision: str) -> None:
    import open_clip
    import torch
    from safetensors.torch import load_file

    names, templates = read_inputs(folder)
    names = names[: SLICES[f"open_clip {precision}"]]
    model = open_clip.create_model(MODEL, precision="fp32" if precision == "float32" else precision)
    model.load_state_dict(load_file(folder / "model" / "open_clip_model.safetensors"))
    model.eval()
    tokenizer = open_clip.get_tokenizer(MODEL)
    formats = [lambda name, template=template: template.replace("{}", name) for template in templates]

    def measure() -> float:
        started = time.perf_counter()
        weights = open_clip.build_zero_shot_classifier(
            model, tokenizer, names, formats, num_classes_per_batch=len(names)
        )
        seconds = time.perf_counter() - started
        torch.save(weights.float(), folder / f"theirs_{precision}.pt")
        return len(names) * len(templates) / seconds

    measure()
    harness.answer(measure, torch=torch.__version__, open_clip=open_clip.__version__)


def work_ours(folder: Path, precision: Any) -> None:
    import torch

    from diptych.checkpoint.layouts import load
    from diptych.embed.texts import embed_texts
    from diptych.zeroshot import build_classifier

    names, templates = read_inputs(folder)
    loaded, some = load(folder / "model"), names[: SLICES[precision]]
    embed = partial(embed_texts, loaded, precision=precision)

    def measure(some: list[str] = some) -> float:
        started = time.perf_counter()
        weights = build_classifier(embed, some, templates)
        seconds = time.perf_counter() - started
        torch.save(weights, folder / f"ours_{precision}_{len(some)}.pt")
        return len(some) * len(templates) / seconds

    measure(names[:10])
    harness.answer(measure, torch=torch.__version__)


def work_whole(folder: Path) -> None:
    """The whole classifier in bfloat16, once."""
    import torch

    from diptych.checkpoint.layouts import load
    from diptych.embed.texts import embed_texts
    from diptych.zeroshot import build_classifier

    names, templates = read_inputs(folder)
    embed = partial(embed_texts, load(folder / "model"), precision="bfloat16")
    build_classifier(embed, names[:10], templates)
    started = time.perf_counter()
    rounded = build_classifier(embed, names, templates)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "prompts_per_second": len(names) * len(templates) / seconds}))
    torch.save(rounded, folder / "whole.pt")


def compare(folder: Path) -> dict[str, float]:
    """The lowest cosines of any two columns that should be the same."""
    import torch
    from torch.nn import functional as F

    whole = torch.load(folder / "whole.pt")
    exact = torch.load(folder / f"ours_exact_{SLICES['exact']}.pt")
    theirs = torch.load(folder / "theirs_float32.pt")
    rounded = torch.load(folder / "theirs_pure_bf16.pt")

    def lowest(a: torch.Tensor, b: torch.Tensor) -> float:
        columns = min(a.shape[1], b.shape[1])
        return F.cosine_similarity(a[:, :columns].double(), b[:, :columns].double(), dim=0).min().item()

    return {
        f"ours bfloat16 to ours exact ({exact.shape[1]} classes)": lowest(whole, exact),
        "ours exact to open_clip float32": lowest(exact, theirs),
        "ours bfloat16 to open_clip float32": lowest(whole, theirs),
        "open_clip pure_bf16 to ours exact": lowest(rounded, exact),
    }


def read_inputs(folder: Path) -> tuple[list[str], list[str]]:
    templates = json.loads((harness.ROOT / "src" / "diptych" / "assets" / "templates.json").read_text())["imagenet_80"]
    return json.loads((folder / "names.json").read_text()), templates


def main() -> None:
    harness.require_peers()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([harness.PEERS_PYTHON, __file__, "prepare", folder], check=True)
        contestants = []
        for contestant in SLICES:
            theirs = contestant.startswith("open_clip")
            python = harness.PEERS_PYTHON if theirs else harness.OURS_PYTHON
            side, precision = ("theirs", contestant.split()[1]) if theirs else ("ours", contestant)
            contestants.append(harness.Contestant(contestant, [python, __file__, side, folder, precision]))
        done = harness.run_rounds(contestants, rounds)
        rows = [
            done.row(f"ImageNet classifier, ours {ours}", "prompts/s", peer, ours=ours)
            for ours in ("bfloat16", "exact")
            for peer in ("open_clip float32", "open_clip pure_bf16")
        ]
        whole = subprocess.run(
            [harness.OURS_PYTHON, __file__, "whole", folder],
            check=True, stdout=subprocess.PIPE, text=True, env=harness.ours_env(),
        )  # fmt: skip
        cosines = compare(folder)
    print(f"the whole classifier, 80,000 prompts: {whole.stdout.strip()}")
    for pair, cosine in cosines.items():
        print(f"lowest cosine, {pair}: 1 - {1 - cosine:.2e}")
    distances = {f"1 - cosine, {pair}": 1 - cosine for pair, cosine in cosines.items()}
    harness.report("classifier", rows, whole=json.loads(whole.stdout), distances=distances, about=done.about)


if __name__ == "__main__":
    match sys.argv[1:2]:
        case ["prepare"]:
            prepare(Path(sys.argv[2]))
        case ["theirs"]:
            work_theirs(Path(sys.argv[2]), sys.argv[3])
        case ["ours"]:
            work_ours(Path(sys.argv[2]), sys.argv[3])
        case ["whole"]:
            work_whole(Path(sys.argv[2]))
        case _:
            main()
