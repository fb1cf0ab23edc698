"""Loading processes: what they hand over, how many they are, and how a training ends that loses one."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from common.errors import one_line
from common.stream import TrainingStream, build_train_loader, worker_count
from detection.config import get_cfg
from detection.data_loader import BatchLoader, build_test_loader, pack, unpack
from tests.birds import draw_birds
from tests.conftest import ROOT, ForkServer, environment
from tests.detection import conftest as detection

CPU = torch.device("cpu")
voc_folder, tiny_opts = detection.voc_folder, detection.tiny_opts


def sample(number: int, height: int, width: int, boxes: int | None, **fields: torch.Tensor) -> dict:
    """What the mapper makes of an image; without instances where `boxes` is None."""
    generator = torch.Generator().manual_seed(number)
    made = {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        "image_id": f"{number:06d}",
        "file_name": f"{number}.jpg",
    }
    if boxes is not None:
        corners = torch.rand(boxes, 4, generator=generator)
        classes = torch.randint(0, 20, (boxes,), generator=generator)
        made["instances"] = Instances((height, width), gt_boxes=Boxes(corners), gt_classes=classes, **fields)
    return made


BATCHES = {
    "without instances": [sample(0, 5, 7, None), sample(1, 7, 5, None)],
    "with them": [sample(0, 5, 7, 2), sample(1, 8, 3, 1)],
    "weights of mixed objects": [
        sample(0, 5, 7, 2, gt_weights=torch.tensor([0.25, 0.75])),
        sample(1, 6, 6, 1, gt_weights=torch.tensor([0.5])),
    ],
    "an image without objects": [sample(0, 5, 7, 2), sample(1, 4, 4, 0), sample(2, 3, 9, 1)],
    "no objects at all": [sample(0, 5, 7, 0), sample(1, 2, 2, 0)],
    "one image": [sample(0, 5, 7, 3)],
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_batch_is_unpacked_as_it_was_packed(batch: list[dict]) -> None:
    rest, tensors = pack(batch)
    # Few tensors, however many images: pixels and one for each field.
    fields = batch[0]["instances"].get_fields() if "instances" in batch[0] else {}
    assert set(tensors) == {"image", *fields}
    unpacked = unpack(rest, tensors, CPU)
    for ours, theirs in zip(unpacked, batch, strict=True):
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["image"], theirs["image"])
        assert all(ours[key] == theirs[key] for key in ("image_id", "file_name"))
        if "instances" in theirs:
            mine, other = ours["instances"], theirs["instances"]
            assert mine.image_size == other.image_size
            assert len(mine) == len(other)
            assert torch.equal(mine.gt_boxes.tensor, other.gt_boxes.tensor)
            for name in set(fields) - {"gt_boxes"}:
                assert torch.equal(mine.get(name), other.get(name))


def test_test_images_come_once_each_with_others_that_are_padded_to_the_same_size(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 100])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 3])
    rng = np.random.default_rng(0)
    records = []
    for number, (height, width) in enumerate(rng.choice([40, 41, 60, 90], (23, 2)).tolist()):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (width, height)).save(path)
        records.append({"file_name": str(path), "image_id": number, "height": height, "width": width})
    batches = list(build_test_loader(cfg, records))
    padded = [{tuple(-(-side // 32) for side in sample["image"].shape[1:]) for sample in batch} for batch in batches]
    assert all(len(sizes) == 1 for sizes in padded)
    assert sorted(sample["image_id"] for batch in batches for sample in batch) == list(range(23))
    # No two lists of a size could be one.
    short = [size for batch, (size,) in zip(batches, padded, strict=True) if len(batch) < 3]
    assert len(short) == len(set(short)) <= len(set.union(*padded)) < len(batches)


def tiny_sample(index: int, position: int) -> dict:
    return sample(position, 4, 6, index % 3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_many_images_and_processes_keep_within_the_open_files_of_a_process() -> None:
    """64 images in each of up to 8 x 2 batches under way: a file for each tensor of an image would be thousands."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    try:
        loader = build_train_loader(TrainingStream(256, tiny_sample, 0, 64), range(40), 8, pack)
        loader.num_workers = 8  # however few cores there are here
        batches = list(BatchLoader(loader, CPU))  # all kept, as a slow training would
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [len(batch) for batch in batches] == [64] * 40
    assert torch.equal(batches[-1][-1]["image"], sample(40 * 64 - 1, 4, 6, None)["image"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone knows which cores a process may use")
def test_loading_processes_are_no_more_than_the_cores_of_a_training_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = os.sched_getaffinity(0)
    assert worker_count(1000) == len(before)
    assert worker_count(0) == 0
    try:
        os.sched_setaffinity(0, {min(before)})
        assert worker_count(1000) == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert [worker_count(wanted) for wanted in (0, 3, 16, 99)] == [0, 3, 16, 16]
    for processes, most in (("4", 4), ("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert worker_count(99) == most
    assert worker_count(0) == 0


def failing_sample(index: int, position: int) -> dict:
    raise ValueError("a bug")


def test_a_bug_in_a_loading_process_is_not_taken_for_its_end() -> None:
    loader = build_train_loader(TrainingStream(4, failing_sample, 0, 2), range(2), 1, pack)
    with pytest.raises(ValueError, match="a bug") as caught:
        next(iter(loader))
    assert one_line(caught.value) is None


def assert_says_why(code: int, printed: str) -> None:
    assert code == 2, printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert "a loading process was killed" in errors[0]
    assert "/dev/shm" in errors[0]


@pytest.fixture(params=["boxes", "birds"])
def command(
    request: pytest.FixtureRequest, voc_folder: Path, tiny_opts: list[str], tmp_path: Path
) -> Callable[[int], list[str]]:
    """The command line of a training on images of a side with one loading process; a checkpoint at every step."""

    def make(side: int) -> list[str]:
        if request.param == "birds":
            words = [
                "classification.train",
                "study",
                f"data={draw_birds(tmp_path)}",
                "--output",
                str(tmp_path / "runs"),
            ]
            recipe = ["model=test_resnet", "pretrained=false", "cache=false", "workers=1", "checkpoint_every=1"]
            return [*words, *recipe, "batch_size=8", "epochs=500", f"image_size={side}"]
        words = [
            "detection.train_net",
            "--data",
            str(voc_folder),
            "--pretrained",
            "0",
            "--output",
            str(tmp_path / "runs"),
        ]
        loading = ["DATALOADER.NUM_WORKERS", "1", "INPUT.MIN_SIZE_TRAIN", f"({side},)", "INPUT.MAX_SIZE_TRAIN", "1000"]
        return [*words, *tiny_opts, *loading, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "2000"]

    return make


def test_a_killed_loading_process_ends_the_training_in_one_line(
    command: Callable[[int], list[str]], fork_server: ForkServer, tmp_path: Path
) -> None:
    process = fork_server.start(*command(64))
    while not list(tmp_path.rglob("model_last.pth")):
        assert process.child.is_alive(), process.log.read_text()
        time.sleep(0.02)
    while not (workers := psutil.Process(process.number).children()):
        time.sleep(0.001)
    os.kill(workers[0].pid, signal.SIGKILL)
    assert_says_why(*process.end())


def test_shared_memory_that_is_too_small_ends_the_training_in_one_line(command: Callable[[int], list[str]]) -> None:
    """As in a container with 64 MB of it and larger batches; here 1 MB are."""
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("needs root, and unshare: only then can this test have a small /dev/shm of its own")
    words = [sys.executable, "-m", "tools.launch", *command(512)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{small} && exec "$@"', "sh", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,  # it once waited for ever
    )
    assert_says_why(done.returncode, done.stdout)


def test_a_loading_process_keeps_opencv_to_one_core() -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        stream = TrainingStream(4, lambda index, position: cv2.getNumThreads(), 0, 2)
        assert list(build_train_loader(stream, range(2), 1, list)) == [[1, 1]] * 2
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)
