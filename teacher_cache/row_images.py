"""The images of rows: read and hashed by a few threads, some rows ahead of whoever takes the rows, in their order."""

import errno
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teacher_cache.errors import SampleError
from teacher_cache.messages import bad_row

_MOST_THREADS: Final = 16
_ROWS_PER_THREAD: Final = 2
"""Rows whose images are in memory at once; more would not make the threads busier."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """The encoded bytes of an image."""

    data: bytes
    sha256: str


RowImages = Future[tuple[LoadedImage, ...]]


def load_images(row: Mapping[str, Any], *, image_root: Path, root: str | None = None) -> tuple[LoadedImage, ...]:
    """Read and hash the images of a row.

    Args:
        row: Its ``images`` may be missing.
        image_root: Folder that paths are relative to.
        root: The same, resolved, where it was before.

    Raises:
        SampleError: An image cannot be had; without the id of the sample.
        TypeError: ``images`` is no list.
    """
    if not row.get("images"):
        return ()
    root = os.path.realpath(image_root) if root is None else root
    data = (_image_bytes(image, image_root=image_root, root=root) for image in row["images"])
    return tuple(LoadedImage(data=one, sha256=hashlib.sha256(one).hexdigest()) for one in data)


def load_ahead(rows: Iterable[tuple[int, Any]], *, image_root: Path) -> Iterator[tuple[int, Any, RowImages | None]]:
    """Yield the rows in their order, each with its place and its images, which come or fail as ``load_images`` says.

    Reading a file and hashing it leave the interpreter to others, so the threads run at once. Rows without images have
    None. At most 32 rows are ahead.
    """
    threads, root = min(_usable_cpus(), _MOST_THREADS), os.path.realpath(image_root)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="row-images")
    coming: deque[tuple[int, Any, RowImages | None]] = deque()
    try:
        try:
            for place, row in rows:
                has_images = isinstance(row, Mapping) and row.get("images")
                images = pool.submit(load_images, row, image_root=image_root, root=root) if has_images else None
                coming.append((place, row, images))
                if len(coming) > _ROWS_PER_THREAD * threads:
                    yield coming.popleft()
        except Exception:
            while coming:  # as without reading ahead, what is wrong with earlier rows is told first
                yield coming.popleft()
            raise
        while coming:
            yield coming.popleft()
    finally:
        for _, _, left in coming:  # those of rows that nobody will take
            if left is not None:
                left.cancel()
        pool.shutdown()


def _usable_cpus() -> int:
    # os.cpu_count counts those of the machine, also where a scheduler lends only some of them
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _image_bytes(image: Any, *, image_root: Path, root: str) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Mapping):
        if image.get("bytes"):
            return _given_bytes(image["bytes"])
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise bad_row(f"an image is given as {type(image).__name__}; expected a path, bytes or both in a record")
    if "://" in image:
        raise bad_row(f"image {image!r} is a URL: run `genrecal data fetch` first, which makes files of URLs")
    try:
        path = os.path.realpath(os.path.join(root, image))  # pathlib takes four times as long, for each image
    except ValueError as error:  # a null character
        raise bad_row(f"image {image!r} is no path: {error}") from error
    if not f"{path}/".startswith(f"{root.rstrip('/')}/"):
        raise bad_row(f"image {image!r} lies outside {image_root}; set `data.image_root` to the folder that holds it")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device may never end
            raise bad_row(f"image {image!r} in {image_root} is no regular file")
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise bad_row(f"image {image!r} is no path: {error.strerror}") from error
        raise SampleError(
            f"image {image!r} in {image_root}: {error.strerror}", sample_id="", reason="missing-image"
        ) from error


def _given_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray | list):
        raise bad_row(f"the bytes of an image are given as {type(data).__name__}")
    try:
        return bytes(data)
    except (TypeError, ValueError) as error:
        raise bad_row(f"the bytes of an image are given as a list that holds no bytes: {error}") from error
