"""A small VOC2007, VOC2012 and CUB_200_2011, drawn in the official layouts for whoever has no data yet.

All randomness of a picture comes from (seed, data set, index of the picture), so each can be drawn again alone.
"""

import json
import tempfile
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError

_FORMAT = 1  # of the drawing: raise it whenever the same seed would give other bytes, and old samples are redrawn
_MARKER = "sample.json"


def draw_sample(root: Path, seed: int = 0) -> None:
    """Draws the sample under `root`, unless it is there already with this seed.

    The drawing happens in a temporary folder beside `root` that is renamed at the end, so what lies under `root` is
    always a complete sample. A sample of another seed is replaced, any other folder is left alone.

    Args:
        root: Data root to create; receives VOC2007/, VOC2012/ and CUB_200_2011/.
        seed: Not negative. Decides everything: for one seed the files are identical to the byte. The 200 birds of
            another seed look different, so it serves for pretraining without having seen the classes.

    Raises:
        UserError: If `root` holds something else or cannot be written, or the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed {seed}: expected 0 or more; choose another seed")
    marker, mark = root / _MARKER, json.dumps({"seed": seed, "format": _FORMAT}) + "\n"
    try:
        if marker.is_file() and marker.read_text() == mark:
            return
        if root.exists() and not marker.is_file() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root}: found something else than a drawn sample; remove it or choose another root")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            fresh = Path(folder) / "fresh"
            _draw(fresh, seed)
            (fresh / _MARKER).write_text(mark)
            if root.exists():
                root.rename(Path(folder) / "old")
            fresh.rename(root)
    except OSError as error:
        raise UserError(f"{root}: cannot draw the sample there ({error}); free space or choose another root") from error


def sample_seed(root: Path) -> int | None:
    """The seed of the drawn sample in `root`; None where other data lies."""
    try:
        return json.loads((root / _MARKER).read_text())["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _draw(root: Path, seed: int) -> None:
    from common.sample import cub, voc  # only now: every training asks for `sample_seed`, few draw and need OpenCV

    pictures = chain(voc.draw(root, seed), cub.draw(root, seed))
    description = f"drawing the sample (seed {seed})"
    for _ in tqdm(pictures, description, voc.COUNT + cub.COUNT, unit="image", disable=None):
        pass
