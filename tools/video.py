"""Videos, frame by frame, read and written by OpenCV."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from common.errors import UserError

# What is wrong with a video is said in our own words; FFmpeg looks at this when the first one is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FINEST_RATE = 65_535  # numerator of a rate that MPEG-4 can hold


def is_video(path: Path) -> bool:
    """Whether a file has the name of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def count_frames(path: Path) -> int:
    """Number of frames, at least 1, as the header says, which need not be right; 1 where `read_frames` would fail."""
    with contextlib.suppress(UserError):
        return max(int(_capture(path).get(cv2.CAP_PROP_FRAME_COUNT)), 1)
    return 1


def frame_rate(path: Path) -> float:
    """Frames a second, at most `FINEST_RATE`; 25 where the header says none, or one that is no rate."""
    rate = _capture(path).get(cv2.CAP_PROP_FPS)
    return min(rate, FINEST_RATE) if math.isfinite(rate) and rate > 0 else 25.0


def _capture(path: Path) -> cv2.VideoCapture:
    return cv2.VideoCapture(_whole_name(path))


def _whole_name(path: Path) -> str:
    """The whole path, since FFmpeg takes a name such as `12:30.mp4` for a protocol's.

    Raises:
        UserError: it is not in UTF-8, with which OpenCV would crash.
    """
    try:
        path.absolute().as_posix().encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r}: is no name in UTF-8, expected one for a video: rename it") from None
    return str(path.absolute())


def read_frames(path: Path, warn: Callable[[str], None]) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 (H, W, 3), RGB.

    Args:
        path: the video.
        warn: called if it has fewer frames than its header says.

    Raises:
        UserError: it has no frame that can be read, or a name that is not in UTF-8.
    """
    capture = _capture(path)
    try:
        count = 0
        while (frame := capture.read()[1]) is not None:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            count += 1
        if not count:
            reason = "cannot be read as a video" if path.is_file() else "no such file"
            raise UserError(f"{path}: {reason}; expected one of {', '.join(sorted(VIDEO_SUFFIXES))} with a picture")
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if count < promised:
            warn(f"{path}: ends after {count} frames, its header says {promised}; these {count} are used")
    finally:
        capture.release()


class VideoFile:
    """An annotated video in MPEG-4, of the size of the first frame that is written; it appears when it is whole.

    Args:
        path: of the video.
        rate: frames a second, at most `FINEST_RATE`, kept to as many digits as MPEG-4 has room for.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, round(rate, int(math.log10(FINEST_RATE / rate)))
        self._frames = 0
        self._unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame, uint8 (H, W, 3), RGB.

        Raises:
            UserError: the file cannot be written, or its name is not in UTF-8.
        """
        if self._writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(_whole_name(self._unfinished), code, self.rate, frame.shape[1::-1])
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: cannot be written; name another folder with OUT=")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self._frames += 1

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.release()
                if kind is None:
                    self._refuse_cut_off()
                    self._unfinished.replace(self.path)
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _refuse_cut_off(self) -> None:
        """OpenCV says nothing where a disk is full."""
        written = int(_capture(self._unfinished).get(cv2.CAP_PROP_FRAME_COUNT))
        if written < self._frames:
            raise UserError(
                f"{self.path}: {max(written, 0)} of {self._frames} frames could be written; expected room for them on "
                "the disk: make some, or name another folder with OUT="
            )
