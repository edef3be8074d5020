"""Files that are whole or not there, and that take nobody's name. Plain Python.

Content is written to a part with a name of its own, on the same disk, which becomes the file at the end. A killed
process leaves its part behind; whoever writes into that folder next removes it. There is no other moment that surely
comes, and a part can be told to be dead by its age alone: folders are shared between computers, whose processes and
locks are not seen.
"""

import contextlib
import os
import secrets
import time
from pathlib import Path

# No loader lists what ends so, and no prompt can name it, since an embedding's name ends at a space or a bracket.
PART = ".attune (unfinished) "
DEAD = 3600  # seconds since a part was last written to; no file takes so long


def write_new(folder, names, content):
    """Writes bytes to the first of ``names`` that is free in ``folder`` and returns its path. Raises OSError."""
    with _part(Path(folder), content) as part:
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileExistsError):
                _become(part, path)
                return path
    raise FileExistsError("every name is taken")


def write_over(path, content):
    """Writes bytes to ``path``; a file that is there already is replaced in one go. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _part(path.parent, content) as part:
        part.replace(path)


def _become(part, path):
    """Gives ``part`` a name. Raises FileExistsError where another process was there first."""
    try:
        os.link(part, path)  # at once, and never over a file
    except FileExistsError:
        raise
    except OSError:  # a disk without links, such as exFAT: the name is taken first
        path.open("xb").close()
        part.replace(path)


@contextlib.contextmanager
def _part(folder, content):
    for old in folder.glob(PART + "*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > DEAD:
                old.unlink()
    part = folder / (PART + secrets.token_hex(8))
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some disks tell only here that they are full
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def reason(problem):
    """Why the system refused, in a few words."""
    return getattr(problem, "strerror", None) or str(problem)
