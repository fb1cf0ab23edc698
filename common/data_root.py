"""Which folder the data comes from when the user names none."""

from collections.abc import Collection
from pathlib import Path

from common.errors import UserError
from common.sample import draw_sample, sample_seed

OFFICIAL = Path("datasets")
SAMPLE = OFFICIAL / "sample"


def resolve_data_root(
    data: str | None, folders: Collection[str], needed: Collection[str] | None = None
) -> tuple[Path, bool]:
    """Finds the data root: the folder named, else `datasets/`, else the drawn sample in `datasets/sample/`.

    The sample stands in only where nothing of such data is present, and it is drawn if it is not there yet.

    Args:
        data: the folder that the user named, or None.
        folders: subfolders of `datasets/` that hold such data, `VOC2007` and `VOC2012` say.
        needed: those of them that must be there; all by default.

    Returns:
        The root, and whether it holds a drawn sample, for which the recipes are made smaller.

    Raises:
        UserError: the folder named does not exist, or `datasets/` holds only a part of what is needed.
    """
    if data is not None:
        root = Path(data).expanduser()  # which may come from a recipe
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; expected the data root, see `make check-datasets`")
        return root, sample_seed(root) is not None
    needed = needed or folders
    missing = [name for name in needed if not (OFFICIAL / name).is_dir()]
    if not missing:
        return OFFICIAL, False
    if any((OFFICIAL / name).is_dir() for name in folders):
        raise UserError(
            f"{OFFICIAL}: {', '.join(missing)} is missing, expected {', '.join(needed)}: see what is there with "
            "`make check-datasets`, fetch the rest with `make datasets`, or name another root with DATA="
        )
    if not all((SAMPLE / name).is_dir() for name in folders):
        draw_sample(SAMPLE, seed=0)
    return SAMPLE, True


def data_facts(root: Path) -> dict:
    """What `record_session` keeps of a data root: its path, and the seed if it is a drawn sample."""
    return {"data": str(root), "sample_seed": sample_seed(root)}
