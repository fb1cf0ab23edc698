"""Finding the images that a command line names."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


def find_images(names: Sequence[str]) -> list[Path]:
    """Image files named one by one, by folder (not its subfolders) or by a pattern with `*`; sorted within each name.

    Raises:
        UserError: a name matches no image.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES)
        elif "*" in name:
            matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        else:
            matches = [path] if path.is_file() else []
        if not matches:
            what = "no image in this folder" if path.is_dir() else "no such file"
            raise UserError(
                f"{name}: {what}; expected IMAGES to name {', '.join(sorted(SUFFIXES))} files or folders of them"
            )
        found += matches
    return list(dict.fromkeys(found))
