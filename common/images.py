"""Finding the images that a command line names, decoding them, and writing pictures."""

import contextlib
import errno
import io
import itertools
import os
import shlex
import struct
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import MAX_PIXELS, write_atomically, wrong_download

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of pictures below MAX_PIXELS, which are taken
SHRUNK = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
# Formats that torchvision does not read, does not turn as EXIF says, or decodes with all frames of an animation; a
# damaged PNG would crash the process.
BY_PILLOW = {"BMP", "TIFF", "WEBP", "GIF", "PNG"}
BY_TORCHVISION = {"JPEG", "MPO"}
# What undoes an orientation, by EXIF's number of it; 6 and 8 undo one another, each of the others itself.
UNTURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
TURNED = UNTURNED | {6: UNTURNED[8], 8: UNTURNED[6]}
# The last bytes of a complete file of each format; some complete files have more after them.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
MOST_WORDS = 100  # of a name with blanks in it
EXPECTED = "a whole JPEG, PNG, GIF, WebP, BMP or TIFF file"


class Header(NamedTuple):
    """What the header of an image file tells.

    Attributes:
        height: of the image that `read_image` gives, in pixels.
        width: likewise.
        orientation: how the pixels were turned to give it, EXIF's number from 1 (not at all) to 8.
    """

    height: int
    width: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.height, self.width

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width of the pixels as they are stored."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, turned: bool = True) -> torch.Tensor:
    """Decodes an image file to RGB whatever its colour space, turned as its EXIF tag says.

    Args:
        path: the file.
        max_pixels: the most decoded pixels that are accepted.
        turned: as its EXIF tag says; without, as it is stored.

    Returns:
        uint8 tensor of shape (3, H, W), RGB, 0 to 255; of an animation its first picture.

    Raises:
        UserError: the file is missing, cannot be decoded, or has more pixels.
    """
    with _failures_named(path, max_pixels):
        with contextlib.suppress(UnidentifiedImageError), Image.open(path) as picture:  # this reads the header alone
            if picture.width * picture.height > max_pixels:
                raise Image.DecompressionBombError
            if picture.format in BY_PILLOW:
                return torch.from_numpy(to_rgb(_decode(picture, turned))).permute(2, 0, 1)
        return decode_jpeg(read_file(str(path)), ImageReadMode.RGB, apply_exif_orientation=turned)


def _decode(picture: Image.Image, turned: bool) -> Image.Image:
    orientation = _header(picture).orientation
    picture.load()
    is_turned = picture.format == "TIFF"  # Pillow turns it on loading, and then drops the tag
    if orientation == 1 or is_turned == turned:
        return picture
    return picture.transpose((TURNED if turned else UNTURNED)[orientation])


def to_rgb(picture: Image.Image) -> np.ndarray:
    """The pixels of a picture, uint8 (H, W, 3), RGB, 0 to 255; of 16 bits the upper 8, and transparent ones as opaque.

    Raises:
        ValueError: the pixels have 32 bits, whose scale is unknown.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits instead of 8 or 16: mode {picture.mode}")
    if picture.mode.startswith("I;16"):  # Pillow would make 255 of all that is more
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if "transparency" in picture.info:  # or Pillow would warn of a palette's
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the image that `read_image` gives, from the header of its file alone.

    A file whose header is not understood is decoded instead.

    Raises:
        UserError: the file is missing, is no image, or has too many pixels.
    """
    return _read_header(path)[0].size


def _read_header(path: str | Path) -> tuple[Header, bool]:
    """The header, and whether the file seems to be cut off."""
    with _failures_named(path, MAX_PIXELS), contextlib.suppress(UnidentifiedImageError), Image.open(path) as picture:
        if picture.format in BY_PILLOW | BY_TORCHVISION:
            header, end = _header(picture), ENDS.get(picture.format, b"")
            assert picture.fp is not None, "an open file"
            picture.fp.seek(-len(end), os.SEEK_END)
            return header, picture.fp.read() != end
    return Header(*read_image(path).shape[1:]), False


def _header(picture: Image.Image) -> Header:
    exif = Image.Exif()
    with contextlib.suppress(SyntaxError, ValueError, struct.error):  # such EXIF says nothing
        if picture.format in BY_TORCHVISION | {"PNG"}:
            # As torchvision has it; Pillow would heed XMP too, and decode a PNG to look behind its pixels.
            exif.load(picture.info.get("exif", b""))
        else:
            exif = picture.getexif()
    orientation = exif.get(ExifTags.Base.Orientation)
    orientation = orientation if orientation in UNTURNED else 1
    height, width = picture.height, picture.width
    if orientation >= 5 and picture.format != "TIFF":  # of which Pillow itself tells the size as it is shown
        height, width = width, height
    return Header(height, width, orientation)


def read_headers(paths: Sequence[str | Path], decode: bool = False) -> list[Header | str]:
    """The header of each image file, or why it cannot be read; in threads, since disks are slow.

    Args:
        paths: the files.
        decode: decode every file as well, not only JPEG and PNG files that seem to be cut off.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_attempt, decode), paths)
        return list(tqdm(found, "looking at images", len(paths), leave=False, disable=None))


def _attempt(decode: bool, path: str | Path) -> Header | str:
    try:
        header, seems_cut_off = _read_header(path)
        if decode or seems_cut_off:
            read_image(path)
        return header
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")


def refuse_unreadable(paths: Sequence[Path]) -> None:
    """Refuses image files whose headers cannot be read.

    Raises:
        UserError: there is one; it names the first few.
    """
    headers = zip(paths, read_headers(paths), strict=True)
    refuse_odd({str(path): header for path, header in headers if isinstance(header, str)})


def refuse_odd(odd: Mapping[str, str]) -> None:
    """Refuses images that cannot be taken.

    Args:
        odd: by their files, why.

    Raises:
        UserError: there is one; it names the first few.
    """
    if odd:
        (first, reason), *others = odd.items()
        names = ", ".join(file for file, _ in others[:5]) + (", ..." if len(others) > 5 else "")
        raise UserError(f"{first}: {reason}{f'; {len(others):,} more cannot be taken: {names}' if others else ''}")


@contextlib.contextmanager
def _failures_named(path: str | Path, max_pixels: int) -> Iterator[None]:
    """Turns whatever decoders raise into a one-line `UserError` with the file's name."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # no table or picture could name it
        raise UserError(f"{path}: its name is not UTF-8; expected one that is: rename it") from error
    # What is no file, a pipe say, might never end.
    if not Path(path).is_file():
        raise UserError(f"{path}: {'is no file' if Path(path).exists() else 'no such file'}; expected {EXPECTED}")
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has more than {max_pixels:,} pixels; expected a smaller picture") from error
    except (RuntimeError, OSError, SyntaxError, ValueError, struct.error) as error:
        if reason := wrong_download(Path(path)):
            raise UserError(f"{path}: {reason}") from error
        # torchvision's message starts with the place in its source, and goes on with advice to those who call it.
        reason = first_line(error).split(", ", 2)[-1].partition(". ")[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); expected {EXPECTED}") from error


def read_shrunk_image(path: str | Path, shrink: int, turned: bool = True) -> tuple[torch.Tensor, tuple[int, int]]:
    """Like `read_image`, but decodes a JPEG file at a reduced size, in a fraction of the time.

    Args:
        path: the file.
        shrink: 1, 2, 4 or 8: the factor by which a JPEG file is reduced.
        turned: see `read_image`.

    Returns:
        The image, and the height and width of the file's image.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    if shrink > 1:
        with contextlib.suppress(OSError, Image.DecompressionBombError):
            data = Path(path).read_bytes()
            with Image.open(io.BytesIO(data)) as picture:
                header = _header(picture)
                height, width = header.size if turned else header.stored
                # OpenCV takes a file that ends too early for a whole one.
                is_whole = data.endswith(ENDS["JPEG"])
                is_plain = picture.format in BY_TORCHVISION and picture.mode in ("RGB", "L")
            if is_plain and is_whole:
                ignored = 0 if turned else cv2.IMREAD_IGNORE_ORIENTATION
                small = cv2.imdecode(np.frombuffer(data, np.uint8), SHRUNK[shrink] | ignored)
                if small is not None and small.shape[:2] == (-(-height // shrink), -(-width // shrink)):
                    return torch.from_numpy(cv2.cvtColor(small, cv2.COLOR_BGR2RGB)).permute(2, 0, 1), (height, width)
    image = read_image(path, turned=turned)
    height, width = image.shape[1:]
    return image, (height, width)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture as PNG or JPEG, whichever `path` ends with, whole or not at all.

    Args:
        path: the file.
        pixels: uint8 (H, W, 3), RGB; of a JPEG at most 65,500 a side.
    """
    options = [] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    # Pillow would keep Python's other threads from working meanwhile. There may be thousands of pictures.
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1]
    write_atomically(path, lambda file: file.write(encoded.data), outlasts_power_cut=False)


def is_of_a_program(name: str) -> bool:
    """Whether a folder or file of this name is what a program has put there, such as thumbnails, and no photograph."""
    return name.startswith((".", "@", "__MACOSX"))


def find_images(names: Sequence[str], suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Image files named one by one, by folder (not its subfolders) or by a pattern with `*` or `?`.

    A name that exists is taken whole, with any blanks. Any other may be several names separated by blanks, quoted or
    not, as make's variable IMAGES holds them.

    Args:
        names: what is named.
        suffixes: of files that count as images in a folder.

    Returns:
        Each file once, sorted within each name.

    Raises:
        UserError: a name matches no image.
    """
    found: list[Path] = []
    for name in itertools.chain.from_iterable(_parted(name, suffixes) for name in names):
        matches = _matches(name, suffixes)
        if not matches:
            what = "no such file"
            with contextlib.suppress(OSError):  # a name may be too long for one
                what = "no image in this folder" if Path(name).is_dir() else what
            raise UserError(
                f"{name}: {what}; expected IMAGES to name {', '.join(sorted(suffixes))} files or folders of them"
            )
        found += matches
    return list(dict.fromkeys(found))


def _parted(text: str, suffixes: Collection[str]) -> list[str]:
    """Splits a text into names: each the longest run of words that exists, or else as the shell splits it by quotes."""
    if " " not in text or _matches(text, suffixes):
        return [text]
    names, words = [], text.split()
    while words:
        runs = (" ".join(words[:end]) for end in range(min(len(words), MOST_WORDS), 0, -1))
        name = next((run for run in runs if _matches(run, suffixes)), None)
        if name is None:
            with contextlib.suppress(ValueError):  # an apostrophe is no quote
                if (quoted := shlex.split(text)) != text.split():
                    return quoted
            name = " ".join(words)
        names.append(name)
        del words[: len(name.split())]
    return names


def _matches(name: str, suffixes: Collection[str]) -> list[Path]:
    """The files that a name stands for, sorted; none where it names nothing, or a folder without images."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return sorted(child for child in path.glob("[!.]*") if child.suffix.lower() in suffixes)
        if path.is_file():
            return [path]
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return []
    # What stands before the first part with a * or a ? is a folder's name, whatever brackets it holds.
    first = next((n for n, part in enumerate(path.parts) if "*" in part or "?" in part), len(path.parts))
    pattern = path.parts[first:]
    if not pattern or any("**" in part and part != "**" for part in pattern):
        return []  # the latter is no pattern that a path knows
    found = (child for child in Path(*path.parts[:first]).glob(str(Path(*pattern))) if child.is_file())
    takes_hidden = pattern[-1].startswith(".")  # else they are left out, as by a shell
    return sorted(child for child in found if takes_hidden or not child.name.startswith("."))
