"""What a command may not do while it meets bad input, noted as it happens: start programs, write outside its folder.

    python -m strangers.watch REPORT ROOT[:ROOT ...] [arguments of diptych]

Python tells of what it opens and starts; what libraries write by themselves is found afterwards, in the folders beside.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_USUAL = (sys.executable, "fc-list")
"""Processes of our own, and what matplotlib asks for the fonts that there are."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STARTS = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "pty.spawn"})
_CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.mkdir": 1, "os.chmod": 1, "os.link": 2, "os.symlink": 2}
_CHANGES |= {"os.truncate": 1, "shutil.rmtree": 1, "os.chown": 1}
"""Event -> how many of its arguments are paths that change."""
_COMPILER = os.path.join(tempfile.gettempdir(), "torchinductor_")
"""A folder that torch's compiler makes when it is imported. Asked here, since the hook may be called while tempfile
holds its lock."""


def watch(report: Path, roots: Sequence[Path]) -> None:
    """From now on, note what breaks the rules in `report`; only below `roots` may files change."""
    allowed = [os.path.realpath(root) for root in roots]
    notes = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    inside = False

    def note(what: str) -> None:
        os.write(notes, (ascii(what)[:300] + "\n").encode())

    def check_path(event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        where = os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path)) or "."), os.path.basename(path))
        if where in ("/dev/null", "/dev/tty") or where.startswith(("/dev/shm/", "/dev/null/", "/proc/", _COMPILER)):
            return
        if not any(os.path.commonpath((where, root)) == root for root in allowed):
            note(f"{event} {where}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside or not (event == "open" or event in _STARTS or event in _CHANGES):
            return
        inside = True
        try:
            if event == "open":
                path, mode, flags = args
                if (isinstance(flags, int) and flags & _WRITES) or (isinstance(mode, str) and set(mode) & set("wax+")):
                    check_path(event, path)
            elif event in _CHANGES:
                for path in args[: _CHANGES[event]]:
                    check_path(event, path)
            elif (program := os.fsdecode(args[0] or args[1][0])) not in _USUAL:
                note(f"started {program}")
        except (OSError, ValueError, TypeError):
            pass
        finally:
            inside = False

    sys.addaudithook(hook)


if __name__ == "__main__":
    report, root, *arguments = sys.argv[1:]
    watch(Path(report), [Path(one) for one in root.split(":")])
    sys.argv = ["diptych", *arguments]
    from diptych.cli import main

    main()
