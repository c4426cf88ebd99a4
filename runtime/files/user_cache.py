"""Where this user's programs keep things."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_folder(mac: str, variable: str, usual: str) -> Path:
    """On Windows the one for all; else, in the user's home, `mac` or what `variable` says in place of the `usual`."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    if sys.platform == "darwin":
        return home / mac
    return Path(os.environ.get(variable) or home / usual)


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again; created if need be."""
    folder = user_folder("Library/Caches", "XDG_CACHE_HOME", ".cache") / "bezel"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
