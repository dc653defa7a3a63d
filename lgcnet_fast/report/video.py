"""Reading and writing videos with PyAV (the extra `video`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgcnet_fast.errors import DataError

VIDEO_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})
_USUAL_RATE = Fraction(25)


def read_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of the first video stream, RGB uint8 (height, width, 3).

    Raises `DataError` if the file holds no readable video or PyAV is not installed.
    """
    with _reading(path) as container:
        if not container.streams.video:
            raise DataError(f"{path}: holds no video; give a file with a video stream")
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def frame_rate(path: Path) -> Fraction:
    """Frames a second; 25 where the file does not say. Raises `DataError` as `read_frames`."""
    with _reading(path) as container:
        streams = container.streams.video
        return (streams[0].average_rate if streams else None) or _USUAL_RATE


class VideoWriter:
    """An H.264 file that takes its size from the first frame; the others have the same size."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av = _pyav(path)
        self._container = self._av.open(str(path), mode="w")
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18"}
        self._started = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._started and kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, picture: NDArray[np.uint8]) -> None:
        """RGB uint8 (height, width, 3); an odd last row or column is repeated, as the format asks
        for even sizes."""
        height, width = picture.shape[:2]
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self._started:
            self._stream.height, self._stream.width = even.shape[:2]
            self._started = True
        frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
        self._container.mux(self._stream.encode(frame))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        fault = f"not a readable video ({error.strerror})"
        raise DataError(f"{path}: {fault}; encode it anew") from None


def _pyav(path: Path) -> ModuleType:
    try:
        import av
    except ImportError:
        raise DataError(
            f'{path}: videos need PyAV; install it with pip install "lgcnet_fast[video]"'
        ) from None
    return av
