"""The fetch against a hostile web and against kills: cases that end as specified, what is lost, what is asked twice.

    python benchmarks/fetch.py [--kills 20] [--pictures 2000]          (make bench NAME=fetch; about two minutes)

The hostile web is that of tests/curate/hostile_web.py: addresses and servers, each with one outcome it must have, and
listening sockets that must never see a connection. Then a fetch of many pictures is killed with SIGKILL again and
again, each time when another share was asked for, and finished; its manifest must have the hash of an undisturbed
run's, every picture must be there, and no more may be asked twice than was under way.
"""

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from harness import ROOT, report

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "curate"))
import fetching  # pyright: ignore[reportMissingImports]
import hostile_web  # pyright: ignore[reportMissingImports]

from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.ledger import Ledger
from diptych.curate.fetch.worker import fetch_partition
from diptych.stage.folder import read_manifest

CONCURRENCY = 8


def main() -> None:
    """Run both parts; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=2000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*hostile(Path(folder) / "hostile"), *killed(Path(folder), asked.kills, asked.pictures)]
        rows += speed(Path(folder))
    report("fetch", rows)
    sys.exit(any((row["bound_is"] == "exact" and row["ours"] != row["peer"]) or row["ratio"] < 1 for row in rows))


def hostile(folder: Path) -> list[dict[str, Any]]:
    """Every case of the hostile web, all at once."""
    folder.mkdir()
    with hostile_web.world() as world:
        cases = hostile_web.cases(world.port)
        began = time.monotonic()
        outcomes = hostile_web.fetch_all(folder, [url for url, _ in cases.values()], world)
        seconds = time.monotonic() - began
        wrong = [f"{name}: {outcomes[url]}, not {end}" for name, (url, end) in cases.items() if outcomes[url] != end]
    print("\n".join(wrong))
    return [
        row("hostile cases as specified", len(cases) - len(wrong), len(cases), "cases", "exact"),
        row("connections to what is forbidden", world.forbidden, 0, "connections", "exact"),
        row("time for all of them", seconds, 10.0, "s", "most"),
    ]


def killed(folder: Path, kills: int, pictures: int) -> list[dict[str, Any]]:
    """A fetch that is killed, beside one that is not."""
    with fetching.serve(seconds=0.002) as server:
        pairs = fetching.write_pairs(folder / "in", [server.url(i) for i in range(pictures)])
        whole, out = folder / "whole" / "fetch", folder / "killed" / "fetch"
        fetching.fetch(fetching.config_for(pairs, whole, server, min_side=8))
        server.asked.clear()
        done = fetching.kill_and_finish(pairs, out, server, pictures, kills)
        asked = server.asked.copy()
    again = asked.total() - len(asked)
    same = read_manifest(out).hash == read_manifest(whole).hash
    return [
        row(f"kills in {pictures} pictures", done, kills, "kills", "exact"),
        row("pictures in the end", read_manifest(out).kept, pictures, "pictures", "exact"),
        row("manifests with the hash of an undisturbed run", int(same), 1, "manifests", "exact"),
        row("requests for what was asked before", again, kills * CONCURRENCY, "requests", "most"),
    ]


def speed(folder: Path, pictures: int = 5000) -> list[dict[str, Any]]:
    """One process against a server in another one, pictures of about 8 kB; both share what cores there are."""
    answer = multiprocessing.get_context("spawn")
    ports = answer.SimpleQueue()
    server = answer.Process(target=serve_for_speed, args=(ports,), daemon=True)
    server.start()
    try:
        place = f"127.0.0.1:{ports.get()}"
        with Ledger(folder / "speed" / "ledger" / "0000") as ledger:
            ledger.add(f"http://{place}/{i}.jpg" for i in range(pictures))
        config = FetchConfig(
            folder=folder, out=folder / "speed", contact="me@example.org", allow_host=(place,), per_host=64
        )
        began = time.monotonic()
        fetch_partition(config, 0)
        seconds = time.monotonic() - began
    finally:
        server.terminate()
        server.join()
    return [row("pictures fetched a second, one process", pictures / seconds, 100.0, "1/s", "least")]


def serve_for_speed(ports: Any) -> None:
    """Serve until terminated, or for two minutes."""

    async def answer(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name == "robots.txt":
            return web.Response(status=404)
        return web.Response(body=made[int(name.removesuffix(".jpg")) % len(made)])

    async def go() -> None:
        app = web.Application()
        app.router.add_get("/{name}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.put(runner.addresses[0][1])
        await asyncio.sleep(120)

    made = [fetching.draw(i, (400, 300)) for i in range(50)]
    asyncio.run(go())


def row(case: str, ours: float, bound: float, unit: str, kind: str) -> dict[str, Any]:
    """As the other tables; a ratio below 1 is a failure."""
    ratio = ours / bound if kind == "least" else bound / ours if ours else 1.0
    return {
        "case": case,
        "ours": ours,
        "peer": bound,
        "peer_name": "bound",
        "unit": unit,
        "ratio": ratio,
        "bound_is": kind,
    }


if __name__ == "__main__":
    main()
