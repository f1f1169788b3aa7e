"""In processes of their own: the type hook of this one does not compile."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from diptych.model.inference.compiled import _is_ours

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")

SCRIPT = """
import sys, time, torch
from torch.nn import functional as F
from diptych.model.inference import int8
from diptych.model.clip import CLIP
from diptych.model.inference.vision import get_encoder
from samples import TINY_VIT
torch.manual_seed(0)
model = CLIP(TINY_VIT).eval()
pixels = torch.randint(0, 256, (3, 3, TINY_VIT.vision.image_size, TINY_VIT.vision.image_size), dtype=torch.uint8)
build = lambda: get_encoder(model.visual, "int8", (0.5,) * 3, (0.3,) * 3)
with torch.inference_mode():
    began = time.perf_counter()
    encode = build()
    seconds = time.perf_counter() - began
    fast = [encode(pixels[:n]) for n in (1, 2, 3, 1)]
    int8.compile_rows = lambda function, examples: function
    plain = build()
    worst = min(F.cosine_similarity(a, plain(pixels[:n])).min().item() for a, n in zip(fast, (1, 2, 3, 1)))
print(worst, seconds, encode.run.add_norm is int8.add_norm, "torch._inductor.compile_fx" in sys.modules)
"""


def run(cache, *flags: str, **env: str) -> tuple[float, float, bool, bool, str]:
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "DIPTYCH_CACHE": str(cache), **env},
    )
    assert done.returncode == 0, done.stderr
    worst, seconds, is_plain, compiles = done.stdout.split()
    return float(worst), float(seconds), is_plain == "True", compiles == "True", done.stderr


@needs_compiler
@pytest.mark.slow
def test_functions_are_compiled_once_and_loaded_after_that(tmp_path):
    folder = tmp_path / "compiled"
    worst, first, is_plain, _, _ = run(tmp_path, "-W", "error::UserWarning:diptych")
    assert worst > 0.9999
    assert not is_plain
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name.split("-")[0] for path in files} == {"norm", "add_norm", "rescale", "quantize_rows", "activate"}
    worst, second, is_plain, _, _ = run(tmp_path)
    assert worst > 0.9999
    assert not is_plain
    assert files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert second < first
    for path, damage in zip(files, (b"", b"no code", b"x" * 4000, path_of_half(next(iter(files)))), strict=False):
        path.write_bytes(damage)
    worst, _, is_plain, _, _ = run(tmp_path)
    assert worst > 0.9999
    assert not is_plain


def path_of_half(path) -> bytes:
    data = path.read_bytes()
    return data[: len(data) // 2]


def test_without_a_compiler_the_functions_themselves_are_used(tmp_path):
    worst, _, is_plain, _, said = run(
        tmp_path, CXX="/nonexistent/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor")
    )
    assert worst > 0.9999
    assert is_plain
    assert "add_norm runs uncompiled, which is slow" in said


def test_only_what_we_own_is_run(tmp_path, monkeypatch):
    (path := tmp_path / "function.bin").touch()
    assert _is_ours(path)
    assert not _is_ours(tmp_path / "none.bin")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert not _is_ours(path)
