"""Time and memory of loading ViT-B-32 from safetensors into a float32 model: ours and open_clip's, the same folder.

    python benchmarks/load.py

Both get a folder in OpenCLIP's layout, random weights, 605 MB, in the page cache. Every figure is of a fresh process
that has imported its library; open_clip is called as its documentation says (`create_model_and_transforms` on a
local-dir), and by `create_model`, which makes the model alone. Memory is the growth of the process'
peak resident set, mapped pages of the file included as the kernel counts them. Then our own layout, with and without
its hash: what XXH3 costs.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import OURS_PYTHON, PEERS_PYTHON, Contestant, answer, matrix_rows, report, require_peers, run_rounds

PEERS = {"open_clip": "open_clip create_model", "open_clip_transforms": "open_clip create_model_and_transforms"}


def prepare(folder: Path) -> None:
    """The same random weights in OpenCLIP's layout and in ours."""
    from diptych.checkpoint import layouts
    from diptych.checkpoint.loaded import Loaded
    from diptych.image import Preprocess
    from diptych.model.clip import CLIP
    from diptych.model.config import get_preset
    from diptych.tokenizer import Tokenizer

    loaded = Loaded(CLIP(get_preset("ViT-B-32")).eval(), Preprocess(image_size=224), Tokenizer.clip())
    layouts.save(loaded, folder / "open_clip", "open_clip")
    layouts.save(loaded, folder / "diptych", "diptych")


def peak() -> float:
    """MiB of the largest resident set so far; not getrusage's, which remembers the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def loader(name: str, folder: Path) -> tuple[Callable[[], Any], dict[str, str]]:
    """What is measured, its library imported."""
    if name.startswith("open_clip"):
        import open_clip  # pyright: ignore[reportMissingImports]
        import torch

        place = f"local-dir:{folder / 'open_clip'}"
        versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
        if name == "open_clip":
            return lambda: open_clip.create_model(place).eval(), versions
        return lambda: open_clip.create_model_and_transforms(place), versions
    import torch

    from diptych.checkpoint import layouts
    from diptych.checkpoint.formats import native
    from diptych.checkpoint.loaded import build

    if name == "ours_unhashed":

        def load_unhashed() -> Any:
            opened = native.open_folder(folder / "diptych")
            return build(replace(opened, weights=replace(opened.weights, xxh3=None)))

        return load_unhashed, {"torch": torch.__version__}
    place = folder / ("diptych" if name == "ours_native" else "open_clip")
    return lambda: layouts.load(place), {"torch": torch.__version__}


def work(name: str, unit: str, folder: Path) -> None:
    load, versions = loader(name, folder)

    def measure() -> float:
        before, started = peak(), time.perf_counter()
        model = load()
        seconds, grown = time.perf_counter() - started, peak() - before
        assert model is not None
        return seconds if unit == "s" else grown

    answer(measure, **versions)


def main() -> None:
    require_peers()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        about = {}
        for unit in ("s", "MiB"):
            names = {"ours": OURS_PYTHON, **dict.fromkeys(PEERS, PEERS_PYTHON), "ours_native": OURS_PYTHON}
            names |= {"ours_unhashed": OURS_PYTHON} if unit == "s" else {}
            rounds = run_rounds([Contestant(n, [p, __file__, n, unit, folder]) for n, p in names.items()], fresh=True)
            what = {"s": "time", "MiB": "peak memory"}[unit]
            for peer, title in PEERS.items():
                rows.append(rounds.row(f"{what}, ViT-B-32, OpenCLIP's folder", unit, peer, peer_name=title))
            rows.append(
                rounds.row(
                    f"{what}, ViT-B-32, our folder (hashed)", unit, "open_clip", "ours_native", PEERS["open_clip"]
                )
            )
            if unit == "s":
                rows.append(
                    rounds.row("time, our folder: hashed, beside unhashed", unit, "ours_unhashed", "ours_native")
                )
            about |= rounds.about
            print({name: [round(value, 2) for value in values] for name, values in rounds.values.items()}, flush=True)
    rows += matrix_rows()
    report("load", rows, about=about)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
