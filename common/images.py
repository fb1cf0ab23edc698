"""Finding the images that a command line names, and decoding them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from common.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


def read_image(path: str | Path) -> torch.Tensor:
    """Decodes an image file to RGB whatever its colour space, turned as its EXIF tag says.

    Returns:
        uint8 tensor of shape (3, H, W), RGB, 0 to 255; of an animation its first picture.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        image = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, OSError) as error:
        # torchvision's message starts with the place in its source.
        reason = "no such file" if not Path(path).exists() else str(error).splitlines()[0].split(", ", 2)[-1]
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); expected a whole JPEG, PNG, GIF or WebP file"
        ) from error
    if image.dim() == 4:
        image = image[0]
    return to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


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
