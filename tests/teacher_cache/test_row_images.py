import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import row_images
from teacher_cache.errors import DataError, SampleError
from teacher_cache.row_images import load_ahead, load_images
from tests.teacher_cache.test_samples import png

THREADS = 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(row_images, "_usable_cpus", lambda: THREADS)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(shade=number))
    return tmp_path


def rows(count: int, *, taken: list[int] | None = None) -> Iterator[tuple[int, Any]]:
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield number, {"images": [f"{number % 8}.png"]}


def test_images_are_loaded_at_once_and_come_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, together = row_images._image_bytes, threading.Barrier(THREADS)

    def wait(image: Any, **options: Any) -> bytes:
        together.wait(timeout=60)  # breaks unless as many threads are here at once
        return load(image, **options)

    expected = [load_images(row, image_root=folder) for _, row in rows(16)]
    monkeypatch.setattr(row_images, "_image_bytes", wait)
    found = list(load_ahead(rows(16), image_root=folder))
    assert [place for place, _, _ in found] == list(range(16))
    assert [images.result() for _, _, images in found if images is not None] == expected


def test_few_rows_are_ahead_and_no_thread_outlives_a_read_that_is_given_up(folder: Path) -> None:
    taken: list[int] = []
    coming = load_ahead(rows(1000, taken=taken), image_root=folder)
    for number in range(5):
        assert next(coming)[0] == number
        assert len(taken) <= number + 1 + 2 * THREADS
    coming.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("row-images")]


def test_rows_before_a_damage_of_the_file_come_before_its_error(folder: Path) -> None:
    def damaged() -> Iterator[tuple[int, Any]]:
        yield 0, {"images": ["0.png"]}
        yield 1, {"images": ["nowhere.png"]}
        yield 2, b"no record"
        raise DataError("cut short")

    coming = load_ahead(damaged(), image_root=folder)
    (first, second, third) = (next(coming) for _ in range(3))
    assert first[2] is not None
    assert first[2].result()[0].data == png(shade=0)
    assert second[2] is not None
    with pytest.raises(SampleError, match=r"nowhere\.png"):
        second[2].result()
    assert third == (2, b"no record", None)
    with pytest.raises(DataError, match="cut short"):
        next(coming)
