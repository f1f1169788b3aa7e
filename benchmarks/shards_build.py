"""Pictures per second from files on this disk to tars: `diptych shards build` beside img2dataset.

    python -m venv .venv-img2dataset && .venv-img2dataset/bin/pip install img2dataset
    python benchmarks/shards_build.py [--pictures 5000] [--rounds 7] [--peer .venv-img2dataset/bin/python]

Both are whole commands, started anew each time, with as many processes as there are cores and 1000 samples in a shard,
and copy the bytes as they are. Ours reads a CSV of paths. img2dataset knows no paths: it has the same list as file://
addresses, no resizing and no re-encoding, and 16 threads a process. Its pins do not fit beside the other peers.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embed_folder import write_pictures
from harness import OURS_PYTHON, ROOT, Contestant, answer, ours_env, report, run_rounds

PEER = ROOT / ".venv-img2dataset" / "bin" / "python"
PEER_SCRIPT = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(
        url_list=sys.argv[1], output_folder=sys.argv[2], processes_count=int(sys.argv[3]), thread_count=16,
        input_format="csv", url_col="url", caption_col="caption", output_format="webdataset",
        number_sample_per_shard=1000, resize_mode="no", disable_all_reencoding=True,
    )
"""


def run_worker(name: str, python: str, folder: str, pictures: int) -> None:
    """Time whole commands; each must leave a tar member for every picture."""
    place, cores = Path(folder), len(os.sched_getaffinity(0))
    out = place / f"out-{name}"
    if name == "ours":
        arguments = ["-m", "diptych", "shards", "build", str(place / "paths.csv"), "--out", str(out)]
        arguments += ["--processes", str(cores)]
    else:
        arguments = [str(place / "peer.py"), str(place / "links.csv"), str(out), str(cores)]

    def measure() -> float:
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        done = subprocess.run([python, *arguments], env=ours_env(), capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        listed = [
            subprocess.run(["tar", "tf", tar], capture_output=True, text=True).stdout for tar in out.glob("*.tar")
        ]
        found = sum(text.count(".jpg\n") for text in listed)
        if found != pictures:
            sys.exit(f"{name} wrote {found} of {pictures} pictures\n{done.stdout}{done.stderr}")
        return pictures / seconds

    answer(measure)


def main() -> None:
    """Prepare the files and run both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", type=Path, default=PEER)
    options = parser.parse_args()
    if not options.peer.exists():
        print(f"{options.peer} is missing: make an environment with img2dataset, as the head of this file says")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "pictures").mkdir()
        drawn = min(500, options.pictures)
        write_pictures(place / "pictures", drawn)
        for i in range(drawn, options.pictures):
            shutil.copyfile(place / f"pictures/{i % drawn:05d}.jpg", place / f"pictures/{i:05d}.jpg")
        names = [f"pictures/{i:05d}.jpg" for i in range(options.pictures)]
        lines = [f"{name},a picture with number {i}" for i, name in enumerate(names)]
        (place / "paths.csv").write_text("\n".join(["image,caption", *lines]))
        (place / "links.csv").write_text("\n".join(["url,caption", *(f"file://{place}/{line}" for line in lines)]))
        (place / "peer.py").write_text(PEER_SCRIPT)
        contestants = [
            Contestant(name, [OURS_PYTHON, __file__, name, python, place, str(options.pictures)])
            for name, python in (("ours", OURS_PYTHON), ("img2dataset", options.peer.absolute()))
        ]
        done = run_rounds(contestants, options.rounds)
    row = done.row("files listed in a CSV to tars, bytes as they are", "images/s", "img2dataset")
    report("shards_build", [row], pictures=options.pictures)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        run_worker(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
