"""Where does the data lie that comes with the package?"""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def shipped(place: str, what: str, instead: str) -> Path:
    """`place` below data/, in an installed package or in a checkout.

    Raises:
        InputError: it is in neither.
    """
    here = Path(__file__).parent
    found = [folder / "data" / place for folder in (here, here.parent)]
    for path in found:
        if path.exists():
            return path
    raise InputError(f"{what} is not at {found[0]}: reinstall ffnprobe, or {instead}")
