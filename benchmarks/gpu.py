"""A GPU held against the processor and measured, in one run of at most eight minutes on a bare machine.

    python benchmarks/gpu.py [--out FILE] [--wheels FOLDER] [--minutes 8] [--only parity,loss]        (make gpu)

Needs PyTorch 2.11 or newer and this folder, no network and no peers' environment. Wheels of what else is missing may
lie in --wheels; what is missing even so is named, and so is each section that would have needed it. A section is a
process of its own: it may fail or run out of its time, and the next one begins. All that was found is in the file after
each row, so that a run that is cut off is not lost. --device cpu --size small tries the script itself, not a machine.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, rounded

SECTIONS = {
    "machine": 20,
    "parity": 40,
    "train ViT-B-32": 110,
    "loss": 30,
    "embed": 50,
    "resume": 80,
    "train ViT-L-14": 140,
}
"""Share of the time that each may take. What one leaves over goes to those behind it."""
MODULES = (
    "numpy",
    "PIL",
    "pyarrow",
    "simplejpeg",
    "xxhash",
    "filelock",
    "fsspec",
    "ftfy",
    "regex",
    "jaxtyping",
    "open_clip",
)
"""What a section may import beside PyTorch."""
STAND_IN = """
class _Shape:
    def __class_getitem__(cls, _):
        return cls


def __getattr__(_):
    return _Shape
"""
"""jaxtyping where it is missing: nothing checks shapes in production."""
TOKENS = 77
"""Tokens of each caption, so that both trainers do the same work: ours would save what is padding."""
_MARK = "@row"

Row = dict[str, Any]


# --- the parent: no PyTorch, no package ------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every section in turn; what came of them, which is also in the file."""
    began = time.monotonic()
    wanted = [name for name in SECTIONS if not options.only or name in options.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder) / "packages"
        record: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": options.device,
            "size": options.size,
            **prepare_packages(packages, options.wheels),
            "sections": {},
        }
        paths = [str(ROOT / "src"), str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        for place, name in enumerate(wanted):
            left = 60 * options.minutes - (time.monotonic() - began)
            seconds = left * SECTIONS[name] / sum(SECTIONS[other] for other in wanted[place:])
            section = record["sections"][name] = {"budget_s": seconds, "rows": [], "error": None}
            command = [sys.executable, "-W", "ignore", __file__, "--section", name, "--seconds", str(seconds)]
            command += ["--device", options.device, "--size", options.size]
            started = time.monotonic()
            for row in follow(command, env, seconds, section):
                section["rows"].append(row)
                write(options.out, record)
                print(f"{name}: {json.dumps(rounded(row))}", flush=True)
            section["seconds"] = time.monotonic() - started
            write(options.out, record)
            if section["error"]:
                print(f"{name}: failed: {section['error']}", flush=True)
    print(f"written: {options.out}")
    return record


def follow(command: list[str], env: dict[str, str], seconds: float, section: dict[str, Any]) -> Iterator[Row]:
    """Rows of a section as they come; how it failed, if it did, is noted in `section`."""
    lines: queue.Queue[str | None] = queue.Queue()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True
        ) as process,
    ):

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        end = time.monotonic() + seconds
        while True:
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                section["error"] = f"its {seconds:.0f} s were over"
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                break
            if line is None:
                break
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
        reader.join()
        if code := process.wait():
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
            section["error"] = section["error"] or f"exit code {code}: {said[-1] if said else 'it said nothing'}"


def prepare_packages(target: Path, wheels: Path | None) -> dict[str, Any]:
    """Install what is missing from a folder of wheels, beside the environment; name what is missing still."""
    target.mkdir()
    notes = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--no-deps",
                "--target",
                target,
                wheel,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                notes.append(f"{wheel.name}: {(done.stdout.strip().splitlines() or ['not installed'])[-1]}")
    sys.path.append(str(target))
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if "jaxtyping" in missing:
        (target / "jaxtyping.py").write_text(STAND_IN)
    return {"missing": missing, "not_installed": notes, "python": sys.version.split()[0]}


def write(path: Path, record: dict[str, Any]) -> None:
    """The file, whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(rounded(record), indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


# --- the sections: each in a process of its own -----------------------------------------------------------------------


class Here:
    """Where a section computes, for how long, and how large."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(options.device)
        self.is_small = options.size == "small"
        self._end = time.monotonic() + options.seconds

    @property
    def left(self) -> float:
        """Seconds that are left of its time."""
        return self._end - time.monotonic()

    def pick(self, full: Any, small: Any) -> Any:
        """A size."""
        return small if self.is_small else full

    def row(self, case: str, **values: Any) -> None:
        """Hand a row to the parent."""
        print(_MARK, json.dumps({"case": case, **values}), flush=True)

    def wait(self) -> None:
        """Until all is computed."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 5, at_most: float = 10.0) -> float:
        """Median seconds of some work, after one run to warm up."""
        work()
        self.wait()
        times: list[float] = []
        end = time.monotonic() + at_most
        while len(times) < repeats and (not times or time.monotonic() < end):
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def reset_memory(self) -> None:
        """Forget the most memory that was held."""
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def memory(self) -> float | None:
        """Most memory held since then, MiB; None where it is not counted."""
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None

    def model(self, preset: str) -> Any:
        """A model of random weights; a tiny one where sizes are small."""
        from dataclasses import replace

        from diptych.model.clip import CLIP
        from diptych.model.config import TextConfig, ViTConfig, get_preset

        config = get_preset(preset)
        if self.is_small:
            text = TextConfig(width=64, layers=2, heads=2)
            vision = ViTConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2)
            config = replace(config, vision=vision, text=text, embed_dim=32)
        self.torch.manual_seed(0)
        return CLIP(config)

    def batch(self, config: Any, count: int, seed: int = 0) -> tuple[Any, Any]:
        """Bytes of pictures [N, 3, H, W] and captions [N, 77], both noise, on the device."""
        generator = self.torch.Generator().manual_seed(seed)
        side, length = config.vision.image_size, min(TOKENS, config.text.context_length)
        pictures = self.torch.randint(0, 256, (count, 3, side, side), dtype=self.torch.uint8, generator=generator)
        text = self.torch.randint(1, config.text.vocab_size - 1, (count, length), generator=generator)
        text[:, -1] = config.text.vocab_size - 1
        return pictures.to(self.device), text.to(self.device)


def to_float(pictures: Any) -> Any:
    """Normalised, roughly as the preprocessing does it."""
    return pictures.float().mul_(1 / 64).sub_(2)


def measure_machine(here: Here) -> None:
    """What the card is, and what its matrix products and memory reach at most."""
    torch = here.torch
    name = torch.cuda.get_device_name() if here.device.type == "cuda" else "cpu"
    total = torch.cuda.get_device_properties(0).total_memory / 2**20 if here.device.type == "cuda" else None
    here.row(
        "machine", name=name, memory_mib=total, torch=torch.__version__, cuda=torch.version.cuda, cores=os.cpu_count()
    )
    for dtype in ("bfloat16", "float32"):
        here.row(f"matrix product, {dtype}", tflops=peak_tflops(here, getattr(torch, dtype)))
    block = torch.ones(here.pick(1 << 28, 1 << 16), device=here.device)
    target = torch.empty_like(block)
    seconds = here.seconds(lambda: target.copy_(block))
    here.row("memory, read and written", gb_per_s=2 * block.nbytes / seconds / 1e9)


def peak_tflops(here: Here, dtype: Any) -> float:
    """The most of several sizes of matrix product."""
    best = 0.0
    for size in here.pick((4096, 8192, 12288), (64, 128)):
        a, b = (here.torch.randn(size, size, device=here.device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / here.seconds(lambda a=a, b=b: a @ b, 10, 3.0) / 1e12)
    return best


def measure_parity(here: Here) -> None:
    """The same weights and pairs here and on the processor, in float32: features, loss, gradients, one update."""
    torch = here.torch
    from diptych.train.config import OptimConfig
    from diptych.train.loss import clip_loss
    from diptych.train.optim import build_optimizer

    torch.backends.cudnn.allow_tf32 = False  # else convolutions are computed with 10 bits of mantissa

    def step(model: Any, device: Any) -> dict[str, Any]:
        model = model.to(device)
        output = model(to_float(pictures.to(device)), text.to(device))
        loss = clip_loss(output.image_features, output.text_features, output.logit_scale)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
        loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        optimizer.step()
        parts = {"image features": output.image_features, "text features": output.text_features, "loss": loss}
        weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
        return {name: part.detach().cpu() for name, part in parts.items()} | {
            "gradients": gradients,
            "weights": weights,
        }

    for preset in here.pick(("ViT-B-32", "RN50"), ("ViT-B-32",)):
        model = here.model(preset)
        pictures, text = here.batch(model.config, here.pick(16, 4))
        started = {name: value.clone() for name, value in model.state_dict().items()}
        there = step(model, torch.device("cpu"))
        model = model.to("cpu")
        model.load_state_dict(started)
        model.zero_grad()
        mine = step(model, here.device)
        for name, expected in there.items():
            difference = (mine[name] - expected).norm() / expected.norm()
            here.row(f"{preset}: {name}", relative_difference=difference.item(), equal=bool(difference < 1e-3))


def measure_train(here: Here, preset: str) -> None:
    """Pairs a second and memory of training in bfloat16: ours and open_clip's, eager and compiled, no loader."""
    from diptych.model.cost import image_tower, text_tower

    torch = here.torch
    peak = peak_tflops(here, torch.bfloat16)
    config = here.model(preset).config
    tokens = min(TOKENS, config.text.context_length)
    flops = 3 * (image_tower(config).flops + text_tower(config, tokens).flops)
    peers = ("ours", "open_clip") if importlib.util.find_spec("open_clip") and not here.is_small else ("ours",)
    here.row("this section's peak", tflops_bfloat16=peak, flops_of_a_pair=flops, peers=list(peers))
    for compiled in (False, True):
        for who in peers:
            size = here.pick(512 if preset == "ViT-B-32" else 128, 8)
            while True:
                if here.left < here.pick(15, 1):
                    here.row(f"{who}, {'compiled' if compiled else 'eager'}", skipped="no time was left")
                    break
                try:
                    speed, memory, warm = time_training(here, preset, who, size, compiled)
                except torch.OutOfMemoryError:
                    size //= 2
                    here.reset_memory()
                    continue
                here.row(
                    f"{who}, {'compiled' if compiled else 'eager'}",
                    batch_size=size,
                    pairs_per_s=speed,
                    peak_memory_mib=memory,
                    share_of_peak=speed * flops / 1e12 / peak,
                    warm_up_s=warm,
                )
                break


def time_training(here: Here, preset: str, who: str, size: int, compiled: bool) -> tuple[float, float | None, float]:
    """Pairs a second, most MiB, and seconds before the first measured step."""
    torch = here.torch
    here.reset_memory()
    if who == "ours":
        from diptych.train.config import OptimConfig
        from diptych.train.loss import clip_loss
        from diptych.train.optim import build_optimizer

        model = here.model(preset).to(here.device)
        config = model.config
        optimizer = build_optimizer(model, OptimConfig())
        if compiled:
            model.visual.compile(dynamic=False)
            model.text.transformer.compile(dynamic=False)

        def forward(pictures: Any, text: Any) -> Any:
            output = model(to_float(pictures), text)
            return clip_loss(output.image_features, output.text_features, output.logit_scale)
    else:
        import open_clip  # pyright: ignore[reportMissingImports]
        from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

        from diptych.model.config import get_preset

        config = get_preset(preset)
        plain = open_clip.create_model(f"{preset}-quickgelu").to(here.device).train()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
        model, loss = torch.compile(plain) if compiled else plain, ClipLoss()

        def forward(pictures: Any, text: Any) -> Any:
            return loss(*model(to_float(pictures), text)[:3])

    pictures, text = here.batch(config, size)

    def step() -> None:
        with torch.autocast(here.device.type, torch.bfloat16):
            value = forward(pictures, text)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    for _ in range(2):
        step()
    here.wait()
    warm = time.perf_counter() - started
    return size / here.seconds(step, 8, min(10.0, here.left / 2)), here.memory(), warm


def measure_loss(here: Here) -> None:
    """Ours in tiles and the plain one, with gradients: seconds and memory above the features."""
    torch = here.torch
    from torch.nn.functional import cross_entropy, normalize

    from diptych.train.loss import clip_loss

    count = here.pick(32768, 256)

    def plain(image: Any, text: Any, scale: Any) -> Any:
        logits = scale * image @ text.T
        labels = torch.arange(len(image), device=image.device)
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    torch.manual_seed(0)
    features = [normalize(torch.randn(count, 512, device=here.device), dim=-1) for _ in range(2)]
    values = {}
    for name, loss in (("ours", clip_loss), ("plain", plain)):
        image, text = (feature.clone().requires_grad_() for feature in features)
        scale = torch.tensor(14.3, device=here.device, requires_grad=True)

        def work(loss: Any = loss, image: Any = image, text: Any = text, scale: Any = scale) -> float:
            image.grad = text.grad = scale.grad = None
            value = loss(image, text, scale)
            value.backward()
            return value.item()

        here.reset_memory()
        before = torch.cuda.memory_allocated() / 2**20 if here.device.type == "cuda" else 0.0
        try:
            seconds = here.seconds(work)
        except torch.OutOfMemoryError:
            here.row(f"{name}, N={count}", skipped="out of memory")
            continue
        memory = here.memory()
        values[name] = work()
        here.row(f"{name}, N={count}", s=seconds, loss=values[name], memory_mib=memory and memory - before)
    if len(values) == 2:
        here.row("difference of the losses", absolute=abs(values["ours"] - values["plain"]))


def measure_embed(here: Here) -> None:
    """Pictures and prompts a second, in bfloat16, as `diptych embed` and the zero-shot classifier compute them."""
    torch = here.torch
    from diptych.model.inference.precision import get_ready
    from diptych.model.inference.text import encode_texts
    from diptych.model.inference.vision import get_encoder

    for preset, size in (("ViT-B-32", 512), ("ViT-L-14", 128)):
        if here.left < here.pick(10, 0):
            here.row(preset, skipped="no time was left")
            continue
        model = here.model(preset).eval().to(here.device)
        size = here.pick(size, 8)
        pictures, _ = here.batch(model.config, size)
        prompts = build_prompts(here, model.config, *here.pick((80, 100), (4, 5)))
        with torch.inference_mode():
            for precision in ("bfloat16", "float32"):
                encode = get_encoder(model.visual, precision, (0.5,) * 3, (0.25,) * 3)
                here.row(
                    f"{preset}, pictures, {precision}",
                    per_s=size / here.seconds(lambda encode=encode, pictures=pictures: encode(pictures)),
                )
            ready = get_ready(model.text.transformer, "bfloat16")
            seconds = here.seconds(
                lambda model=model, ready=ready, prompts=prompts: encode_texts(model.text, ready, prompts)
            )
            here.row(f"{preset}, prompts, bfloat16", per_s=len(prompts) / seconds, prompts=len(prompts))
            if importlib.util.find_spec("open_clip") and not here.is_small:
                import open_clip  # pyright: ignore[reportMissingImports]

                peer = open_clip.create_model(f"{preset}-quickgelu").to(here.device).eval()
                with torch.autocast(here.device.type, torch.bfloat16):
                    image, text = to_float(pictures), prompts.to(here.device).split(512)
                    per_s = size / here.seconds(lambda peer=peer, image=image: peer.encode_image(image))
                    here.row(f"{preset}, pictures, open_clip amp_bf16", per_s=per_s)
                    seconds = here.seconds(lambda peer=peer, text=text: [peer.encode_text(part) for part in text])
                    here.row(f"{preset}, prompts, open_clip amp_bf16", per_s=len(prompts) / seconds)


def build_prompts(here: Here, config: Any, templates: int, names: int) -> Any:
    """Tokens [N, 77] of names put into templates: start, template, name, end, padding."""
    generator = here.torch.Generator().manual_seed(0)
    vocabulary = config.text.vocab_size

    def draw(rows: int, length: int) -> Any:
        return here.torch.randint(1, vocabulary - 2, (rows, length), generator=generator)

    heads, tails = draw(templates, 5), draw(names, 3)
    rows = here.torch.zeros(templates * names, config.text.context_length, dtype=here.torch.int64)
    rows[:, 0] = vocabulary - 2
    rows[:, 1:6] = heads.repeat(names, 1)
    rows[:, 6:9] = tails.repeat_interleave(templates, 0)
    rows[:, 9] = vocabulary - 1
    return rows


def measure_resume(here: Here) -> None:
    """Does a run that is killed in the middle and started again end with the same bits, and do two undisturbed ones?"""
    steps = here.pick(12, 6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "shards", here.pick(512, 64))
        ends = {}
        for run, kills in (("undisturbed", 0), ("killed", steps // 2 + 1), ("undisturbed again", 0)):
            for kill_at in (kills, 0) if kills else (0,):
                job = [str(folder / "shards"), str(folder / run), str(steps), str(kill_at)]
                command = [sys.executable, "-W", "ignore", __file__, "--train", *job]
                command += ["--device", str(here.device), "--size", here.pick("full", "small")]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
                if (done.returncode != 0) != bool(kill_at):
                    raise RuntimeError(f"{run}: code {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
            ends[run] = folder / run / f"step_{steps:08d}"
            if run != "undisturbed":
                here.row(f"{run}, beside the undisturbed run", **compare(ends["undisturbed"], ends[run]))


def compare(one: Path, other: Path) -> Row:
    """Whether two checkpoints hold the same bits, and how far apart their weights are if not."""
    from diptych.checkpoint.weights.tensors import read_safetensors

    names = ("model.safetensors", "training.safetensors")
    equal = all(
        hashlib.sha256((one / name).read_bytes()).digest() == hashlib.sha256((other / name).read_bytes()).digest()
        for name in names
    )
    data = [folder / names[0] for folder in (one, other)]
    entries = read_safetensors(data[0]).entries
    import torch

    def load(path: Path, entry: Any) -> Any:
        with open(path, "rb") as file:
            file.seek(entry.start)
            return torch.frombuffer(bytearray(file.read(entry.nbytes)), dtype=torch.float32)

    furthest = max((load(data[0], e) - load(data[1], e)).abs().max().item() for e in entries.values())
    return {"equal_bits": equal, "largest_difference_of_a_weight": furthest}


def write_shards(folder: Path, count: int) -> None:
    """Pairs of noise."""
    import io

    import numpy as np
    from PIL import Image

    from diptych.pair import Pair
    from diptych.shards.write import write_shards

    rng = np.random.default_rng(0)

    def make(number: int) -> Pair:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
        return Pair(key=f"{number:06d}", caption=f"a photo of number {number}", image=buffer.getvalue())

    write_shards((make(number) for number in range(count)), folder)


def train(here: Here, data: Path, out: Path, steps: int, kill_at: int) -> None:
    """A run that kills itself, as nothing could prevent, behind a step; 0: it does not."""
    from diptych.shards.config import LoaderConfig, SourceConfig
    from diptych.train import loop
    from diptych.train.config import OptimConfig, RunConfig, TrainConfig

    def on_step(report: Any) -> None:
        if report.step == kill_at:
            os._exit(9)

    loop.run(
        TrainConfig(
            model=here.model("ViT-Ti-16").config,
            data=(SourceConfig(path=data),),
            out=out,
            loader=LoaderConfig(batch_size=here.pick(128, 16), workers=here.pick(4, 0)),
            optim=OptimConfig(warmup=2),
            run=RunConfig(steps=steps, checkpoint_every=steps // 3, device=here.device.type),
        ),
        on_step=on_step,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of what this machine lacks")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="", help=f"some of: {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        data, out, steps, kill_at = options.train
        train(Here(options), Path(data), Path(out), int(steps), int(kill_at))
    elif options.section:
        kind, _, preset = options.section.partition(" ")
        work = globals()[f"measure_{kind}"]
        work(Here(options), *([preset] if preset else []))
    else:
        record = run(options)
        sys.exit(any(section["error"] for section in record["sections"].values()))


if __name__ == "__main__":
    main()
