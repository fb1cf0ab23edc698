"""Downloads from a server on the loopback that can lose connections, know no ranges, or send something else."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from PIL import Image

from common.errors import UserError
from tools import check_datasets, download_datasets
from tools.download_datasets import Archive, download

ROOT = Path(__file__).resolve().parents[2]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path.strip("/"))
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.knows_ranges else 0
        self.server.starts.append(start)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.bytes_a_connection])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.starts, server.knows_ranges, server.bytes_a_connection = {}, [], True, 2**40
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make_tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def voc_files(split: str, ids: list[str]) -> dict[str, bytes]:
    files = {f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt": "\n".join(ids).encode()}
    for id_ in ids:
        files[f"VOCdevkit/VOC2007/Annotations/{id_}.xml"] = (
            b"<annotation><size><width>8</width><height>8</height></size></annotation>"
        )
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "jpeg")
        files[f"VOCdevkit/VOC2007/JPEGImages/{id_}.jpg"] = picture.getvalue() + id_.encode() * 50_000
    return files


@pytest.fixture
def archives(monkeypatch, server) -> dict[str, bytes]:
    """Small archives in the form of the official ones, served by the server."""
    contents = {
        "VOCtrainval_06-Nov-2007.tar": make_tar(voc_files("trainval", ["000001", "000002", "000003"])),
        "VOCtest_06-Nov-2007.tar": make_tar(voc_files("test", ["000004"])),
    }
    server.files.update(contents)
    official = [
        Archive(name, "http://127.0.0.1:9", hashlib.md5(content).hexdigest(), len(content), "VOCdevkit/VOC2007")
        for name, content in contents.items()
    ]
    monkeypatch.setattr(download_datasets, "ARCHIVES", {"voc2007": official})
    monkeypatch.setitem(check_datasets.OFFICIAL_SPLITS, "voc2007", ("VOC2007", {"trainval": 3, "test": 1}))
    return contents


def assert_whole(root: Path) -> None:
    files = voc_files("trainval", ["000001", "000002", "000003"]) | voc_files("test", ["000004"])
    for name, content in files.items():
        assert (root / Path(name).relative_to("VOCdevkit")).read_bytes() == content
    assert {path.name for path in root.iterdir()} == {"VOC2007"}


def test_both_archives_become_one_folder_and_the_next_call_asks_nobody(archives, server, tmp_path):
    download(["voc2007"], tmp_path, server.address)
    assert_whole(tmp_path)
    server.files.clear()
    download(["voc2007"], tmp_path, server.address)
    assert len(server.starts) == 2


def test_lost_connections_are_taken_up_where_they_broke(archives, server, tmp_path):
    server.bytes_a_connection = 200_000
    download(["voc2007"], tmp_path, server.address)
    assert_whole(tmp_path)
    second = server.starts.index(0, 1)
    for starts, content in zip((server.starts[:second], server.starts[second:]), archives.values(), strict=True):
        steps = [after - before for before, after in pairwise([*starts, len(content)])]
        assert len(steps) > 1
        assert all(100_000 < step <= 200_000 for step in steps[:-1])


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_goes_on_after_an_interruption(archives, server, tmp_path, knows_ranges):
    """What an earlier call left: half of one archive, all of the other under its working name, half an unpacking."""
    server.knows_ranges = knows_ranges
    (first, half), (second, whole) = archives.items()
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{first}.part").write_bytes(half[: len(half) // 2])
    (tmp_path / "archives" / f"{second}.part").write_bytes(whole)
    (tmp_path / ".VOC2007.part" / "JPEGImages").mkdir(parents=True)
    (tmp_path / ".VOC2007.part" / "JPEGImages" / "000001.jpg").write_bytes(b"half")
    download(["voc2007"], tmp_path, server.address)
    assert_whole(tmp_path)
    assert server.starts == ([len(half) // 2, len(whole)] if knows_ranges else [0, 0])


def test_a_wrong_checksum_leaves_nothing(archives, server, tmp_path):
    name = "VOCtest_06-Nov-2007.tar"
    server.files[name] = make_tar(voc_files("test", ["000009"]))
    with pytest.raises(UserError, match=rf"{name}: the md5 is not \w+, so what came was deleted"):
        download(["voc2007"], tmp_path, server.address)
    assert not (tmp_path / "VOC2007").exists()
    assert [path.name for path in (tmp_path / "archives").iterdir()] == ["VOCtrainval_06-Nov-2007.tar"]
    server.files[name] = archives[name]
    download(["voc2007"], tmp_path, server.address)
    assert_whole(tmp_path)


def test_fills_up_an_incomplete_data_set_and_keeps_what_the_user_added(archives, server, tmp_path):
    download(["voc2007"], tmp_path, server.address)
    (tmp_path / "VOC2007" / "JPEGImages" / "000002.jpg").unlink()
    (tmp_path / "VOC2007" / "JPEGImages" / "000003.jpg").write_bytes(b"")
    mine = tmp_path / "VOC2007" / "ImageSets" / "Main" / "mine.txt"
    mine.write_text("000001\n")
    download(["voc2007"], tmp_path, server.address)
    assert_whole(tmp_path)
    assert mine.read_text() == "000001\n"


def test_another_data_set_of_that_name_is_left_alone(archives, server, tmp_path):
    download(["voc2007"], tmp_path, server.address)
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n")
    with pytest.raises(UserError, match="another data set"):
        download(["voc2007"], tmp_path, server.address)


def test_archives_put_there_by_hand_or_in_a_folder_need_no_network(archives, tmp_path):
    folder = tmp_path / "from a colleague"
    folder.mkdir()
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    download(["voc2007"], tmp_path / "one", mirror=str(folder))
    assert_whole(tmp_path / "one")
    (tmp_path / "two").mkdir()
    folder.rename(tmp_path / "two" / "archives")
    download(["voc2007"], tmp_path / "two")
    assert_whole(tmp_path / "two")


def test_too_little_space_is_noticed_before_anything_is_fetched(archives, server, tmp_path, monkeypatch):
    huge = [archive._replace(size=10**16) for archive in download_datasets.ARCHIVES["voc2007"]]
    monkeypatch.setitem(download_datasets.ARCHIVES, "voc2007", huge)
    with pytest.raises(UserError, match="GB free"):
        download(["voc2007"], tmp_path, server.address)
    assert server.starts == []


def test_space_is_needed_for_the_archives_and_as_much_again_but_for_what_is_there(
    archives, server, tmp_path, monkeypatch
):
    name, content = next(iter(archives.items()))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{name}.part").write_bytes(content[:100_000])
    needed = 2 * sum(map(len, archives.values())) - 100_000
    for free, has_room in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with nullcontext() if has_room else pytest.raises(UserError, match="GB free"):
            download(["voc2007"], tmp_path, server.address)
        assert bool(server.starts) == has_room


@pytest.mark.parametrize("name", ["../evil.txt", "VOCdevkit/VOC2007/../../../evil.txt", "/tmp/evil.txt"])
def test_a_path_that_leads_outside_is_refused(tmp_path, name):
    path = tmp_path / "archive.tgz"
    path.write_bytes(make_tar({name: b"evil"}, "w:gz"))
    with pytest.raises(UserError, match="unsafe path"):
        download_datasets.unpack(path, "VOCdevkit/VOC2007", tmp_path / "deep" / "er")
    assert {path.name for path in tmp_path.rglob("*")} == {"archive.tgz"}


def test_links_and_what_lies_beside_the_folder_are_not_unpacked(tmp_path):
    path = tmp_path / "archive.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("CUB_200_2011/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
        for name in ("attributes.txt", "CUB_200_2011/link/file", "CUB_200_2011/classes.txt"):
            archive.addfile(tarfile.TarInfo(name))
    download_datasets.unpack(path, "CUB_200_2011", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"link/file", "classes.txt"}
    assert not (tmp_path / "out" / "link").is_symlink()


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9", "no/such/folder"])
def test_without_a_network_one_line_tells_the_manual_way(tmp_path, mirror):
    command = [sys.executable, "-m", "tools.download_datasets", "cub", "--data", str(tmp_path), "--mirror", mirror]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "CUB_200_2011.tgz" in process.stderr
    assert mirror != "http://127.0.0.1:9" or f"put it into {tmp_path / 'archives'}" in process.stderr
