"""Fetches the official archives of VOC2007, VOC2012 and CUB-200-2011 and unpacks them below a root.

    python -m tools.download_datasets [voc2007 voc2012 cub] --data datasets     # make datasets

Complete data sets are left alone. After an interruption the same command goes on: a download is resumed; unpacking
starts again, and its files appear only once it is done. `--mirror` names another place for the archives: an address or
a folder. An archive that is already in `<root>/archives` is not fetched: the way to go without a network.
"""

import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pooch
import requests
from tqdm import tqdm

from common.errors import ArgumentParser, UserError, exits_on_user_error
from tools.check_datasets import OFFICIAL_SPLITS, check_official, data_set_name, is_downloadable

CHUNK = 2**16  # bytes; the last one of a lost connection is lost with it


class Archive(NamedTuple):
    """An official archive."""

    name: str
    address: str  # of its folder
    md5: str
    size: int  # bytes; the unpacked files take about as much
    folder: str  # the folder in it that holds the data set


VOC_ADDRESS = "http://host.robots.ox.ac.uk/pascal/VOC"
ARCHIVES: dict[str, list[Archive]] = {
    "voc2007": [
        Archive(
            "VOCtrainval_06-Nov-2007.tar",
            f"{VOC_ADDRESS}/voc2007",
            "c52e279531787c972589f7e41ab4ae64",
            460_032_000,
            "VOCdevkit/VOC2007",
        ),
        Archive(
            "VOCtest_06-Nov-2007.tar",
            f"{VOC_ADDRESS}/voc2007",
            "b6e924de25625d8de591ea690078ad9f",
            451_020_800,
            "VOCdevkit/VOC2007",
        ),
    ],
    "voc2012": [
        Archive(
            "VOCtrainval_11-May-2012.tar",
            f"{VOC_ADDRESS}/voc2012",
            "6cd6e144f989b92b3379bac3b3de84fd",
            1_999_639_040,
            "VOCdevkit/VOC2012",
        )
    ],
    "cub": [
        Archive(
            "CUB_200_2011.tgz",
            "https://data.caltech.edu/records/65de6-vp158/files",
            "97eceeb196236b17998738112f37df78",
            1_150_585_339,
            "CUB_200_2011",
        )
    ],
}


@exits_on_user_error
def main() -> None:
    """Command line: fetches and unpacks the data sets named."""
    parser = ArgumentParser(description="Fetches and unpacks the official data sets.")
    parser.add_argument("names", nargs="*", type=data_set_name, help=f"{', '.join(OFFICIAL_SPLITS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="default: %(default)s")
    parser.add_argument("--mirror", default="", help="address or folder that holds the archives instead")
    arguments = parser.parse_args()
    try:
        download(arguments.names or list(ARCHIVES), arguments.data, arguments.mirror)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command goes on with it") from None
    except OSError as error:
        raise UserError(
            f"{error.filename or arguments.data}: {error.strerror or error}; mend that and go on"
        ) from error


def download(names: list[str], root: Path, mirror: str = "") -> None:
    """Brings official data sets to completeness below a root.

    Args:
        names: keys of `ARCHIVES`.
        root: folder that will hold `VOC2007/`, `VOC2012/` and `CUB_200_2011/`.
        mirror: address or folder that holds the archives; empty for the official addresses.

    Raises:
        UserError: no connection, a wrong checksum, no space, or another data set in the place of an official one.
    """
    wanted = [name for name in names if _is_wanted(root, name)]
    archives = root / "archives"
    _check_space(root, archives, [archive for name in wanted for archive in ARCHIVES[name]])
    for name in wanted:
        paths = [fetch(archive, archives, mirror) for archive in ARCHIVES[name]]
        folder = root / OFFICIAL_SPLITS[name][0]
        aside = root / f".{folder.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        for archive, path in zip(ARCHIVES[name], paths, strict=True):
            unpack(path, archive.folder, aside)
        _move_into(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
        for report in check_official(root, name):
            if report.state != "complete":
                raise UserError(f"{folder}: {report.name} is {report.state} after unpacking ({report.remark})")
        for path in paths:
            path.unlink()
        print(f"{folder}: complete")
    if archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()


def _is_wanted(root: Path, name: str) -> bool:
    reports = check_official(root, name)
    folder = root / OFFICIAL_SPLITS[name][0]
    if not is_downloadable(reports):
        found = ", ".join(f"{report.expected:,} images in {report.name}" for report in reports)
        raise UserError(
            f"{folder}: holds another data set ({found}); expected the official one or nothing: move it away"
        )
    if all(report.state == "complete" for report in reports):
        print(f"{folder}: complete")
        return False
    return True


def _check_space(root: Path, archives: Path, wanted: list[Archive]) -> None:
    needed = 0
    for archive in wanted:
        parts = (archives / archive.name, archives / f"{archive.name}.part")
        needed += 2 * archive.size - sum(part.stat().st_size for part in parts if part.is_file())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root}: {free / 1e9:.1f} GB free, but archives and files take {needed / 1e9:.1f} GB; make space, "
            "or fetch one data set at a time: python -m tools.download_datasets voc2007"
        )


def fetch(archive: Archive, folder: Path, mirror: str = "") -> Path:
    """Downloads an archive into `folder` unless it is there, checks its md5 and returns its path.

    Raises:
        UserError: it cannot be had, or its checksum is wrong (it is deleted then).
    """
    address = f"{(mirror or archive.address).rstrip('/')}/{archive.name}"
    path = folder / archive.name
    pooch.get_logger().setLevel("WARNING")  # it announces every file in two lines
    registry = pooch.create(
        folder, base_url="", registry={archive.name: f"md5:{archive.md5}"}, urls={archive.name: address}
    )
    print(f"{path}: {archive.size / 1e9:.1f} GB, from {address}", flush=True)
    by_hand = f"get {archive.name} another way, put it into {folder} and run the same command (see datasets/README.md)"
    try:
        registry.fetch(archive.name, downloader=download_resuming)
    except ValueError:
        raise UserError(
            f"{address}: the md5 is not {archive.md5}, so what came was deleted; run the same command, or {by_hand}"
        ) from None
    except requests.HTTPError as error:
        raise UserError(f"{address}: the server says {error.response.status_code}; {by_hand}") from error
    except requests.RequestException as error:
        there = " (the file there now has a wrong md5)" if path.exists() else ""
        raise UserError(f"{address}: no connection, or it was lost{there}; {by_hand}") from error
    return path


def download_resuming(url: str, output_file: str, registry: pooch.Pooch) -> None:
    """Downloader for pooch that goes on where the last call, or a lost connection, stopped.

    What has come so far lies in `<name>.part`; a server that does not know ranges sends everything again.
    """
    name = url.rsplit("/", 1)[-1]
    if "://" not in url:
        shutil.copyfile(url, output_file)
        return
    part = Path(registry.path) / f"{name}.part"
    part.touch()
    while True:
        before = part.stat().st_size
        try:
            _receive(url, part)
            break
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.Timeout):
            if part.stat().st_size <= before:  # as long as every try brings something, the next one is worth it
                raise
    part.replace(output_file)


def _receive(url: str, part: Path) -> None:
    start = part.stat().st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == requests.codes.range_not_satisfiable:
            return  # nothing is left to come: the checksum decides
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0
        total = start + int(response.headers.get("Content-Length", 0))
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                desc=part.stem, initial=start, total=total or None, unit="B", unit_scale=True, disable=None
            ) as progress,
        ):
            for chunk in response.iter_content(CHUNK):
                progress.update(file.write(chunk))


def unpack(path: Path, folder: str, destination: Path) -> None:
    """Unpacks one folder of a tar archive.

    Only the contents of regular files are taken, never a link, an owner or a mode: that is stricter than tarfile's
    filter "data", which the Python 3.11.2 of Debian 12 lacks.

    Args:
        path: the archive.
        folder: the folder in it, which becomes `destination`.
        destination: where the files go; those of the same name are overwritten.

    Raises:
        UserError: a path in the archive leads outside.
    """
    with tarfile.open(path) as archive, tqdm(desc=path.name, unit=" files", disable=None) as progress:
        for member in archive:
            name = PurePosixPath(member.name)
            if ".." in name.parts or name.is_absolute():
                raise UserError(f"{path}: holds the unsafe path {member.name!r}; it was not unpacked: get it anew")
            if member.isfile() and name.is_relative_to(folder) and (source := archive.extractfile(member)):
                target = destination / name.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                progress.update()


def _move_into(source: Path, target: Path) -> None:
    """Renames a folder, or what is in it where the target is there already: an incomplete data set is filled up."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move_into(path, target / path.name)
    else:
        shutil.move(source, target)  # which copies to another disk


if __name__ == "__main__":
    main()
