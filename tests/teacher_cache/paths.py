"""Spellings of paths that lead out of a folder, and places of a cache where one may stand."""

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from tests.teacher_cache.assault import Attack
from tests.teacher_cache.forge import Body, forge, forge_index, only

OUTSIDE = "@"
"""Stands in a spelling for the absolute path of the folder that must stay as it is."""

SPELLINGS = (
    "..",
    ".",
    "../outside/canary",
    "../../outside/canary",
    "../../../outside/canary",
    "../../../../../../../../../../etc/passwd",
    "a/../../outside/canary",
    "shards/../../outside/canary",
    "./../outside/canary",
    ".//..//outside//canary",
    "@",
    "@/canary",
    "/@/canary",
    "/",
    "//",
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/cwd/canary",
    "/dev/zero",
    "/dev/stdin",
    "~/canary",
    "~root/canary",
    "$HOME/canary",
    "${PWD}/../outside/canary",
    "C:\\canary",
    "C:/canary",
    "C:canary",
    "\\\\server\\share\\canary",
    "\\\\?\\C:\\canary",
    "..\\outside\\canary",
    "..\\..\\outside\\canary",
    "a\\..\\..\\outside",
    "/..\\outside/canary",
    "canary\0",
    "\0",
    "../outside/canary\0.json",
    "@/canary\0",
    "%2e%2e/outside/canary",
    "%2e%2e%2foutside%2fcanary",
    "..%2foutside%2fcanary",
    "..%5coutside%5ccanary",
    "%252e%252e%252foutside",
    "..%c0%afoutside%c0%afcanary",
    "%00",
    "\uff0e\uff0e/outside/canary",
    "\u2024\u2024/outside/canary",
    "\u2025/outside/canary",
    "..\u2215outside\u2215canary",
    "..\u2044outside\u2044canary",
    "..\uff0foutside\uff0fcanary",
    "\u202e../outside/canary",
    "..\u200b/outside/canary",
    "../outside/canary\n",
    "\n../outside/canary",
    " ../outside/canary",
    ".. /outside/canary",
    "\t",
    "a\rb",
    "\x1b[2J",
    "file://@/canary",
    "file:@/canary",
    "s3://bucket/canary",
    "http://localhost/canary",
    "",
    " ",
    "a//b",
    "a/./b",
    "a/",
    "./a",
    ".hidden",
    "-rf",
    "*",
    "canary:stream",
    "nul\u0000con",
    "a" * 300,
    "/".join("a" * 40),
    "\u00e9" * 200,
)

Place = Callable[[str], Attack]
"""Makes an attack of a spelling."""


def spelled(root: Path, spelling: str) -> str:
    """Put in the place that is named by its absolute path."""
    return spelling.replace(OUTSIDE, str(root.parent / "outside"))


def _in_entry(key: str) -> Place:
    def change(entries: list[Body], text: str) -> None:
        entries[0][key] = text

    return lambda spelling: lambda root: forge_index(root, lambda _, entries: change(entries, spelled(root, spelling)))


def _in_document(pattern: str, change: Callable[[Body, str], object]) -> Place:
    return lambda spelling: (
        lambda root: forge(root, pattern, lambda body: _apply(change, body, spelled(root, spelling)))
    )


def _apply(change: Callable[[Body, str], object], body: Body, text: str) -> None:
    change(body, text)


def _rename_index(body: Body, text: str) -> None:
    body["files"][text] = body["files"].pop(body["index"])
    body["index"] = text


def _rename_file(body: Body, text: str) -> None:
    name = next(iter(body["files"]))
    body["files"][text] = body["files"].pop(name)


PLACES: dict[str, Place] = {
    "a shard id in the plan": _in_document("plans/*", lambda body, text: body["shards"][0].update(shard_id=text)),
    "a shard id in the index": _in_entry("shard_id"),
    "an attempt in the index": _in_entry("attempt"),
    "a shard id in a record": _in_document("commits/*", lambda body, text: body.update(shard_id=text)),
    "an attempt in a record": _in_document("commits/*", lambda body, text: body.update(attempt=text)),
    "a file in a record": _in_document("commits/*", _rename_file),
    "another file in a record": _in_document(
        "commits/*", lambda body, text: body["files"].update({text: body["files"]["zarr.json"]})
    ),
    "the index in a snapshot": _in_document("snapshots/*", _rename_index),
    "another file in a snapshot": _in_document(
        "snapshots/*", lambda body, text: body["files"].update({text: body["files"]["CACHE.json"]})
    ),
    "the plan in the manifest": _in_document("CACHE.json", lambda body, text: body["plan"].update(file=text)),
    "the head in the manifest": _in_document("CACHE.json", lambda body, text: body["teacher_head"].update(file=text)),
}

FILES = (
    "CACHE.json",
    "plans/*",
    "commits/*",
    "snapshots/*",
    "index/*",
    "teacher_head*",
    "shards/*/zarr.json",
    "shards/*/hidden_states/c.0.0",
)
FOLDERS = ("plans", "commits", "snapshots", "index", "shards", "staging", "claims", "shards/*", "shards/*/token_ids")


def _to_copy(path: Path, outside: Path) -> None:
    shutil.move(path, outside / "moved")
    path.symlink_to(outside / "moved")


def _to_canary(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "canary")


def _upwards(path: Path, outside: Path) -> None:
    shutil.move(path, outside / "moved")
    path.symlink_to(os.path.relpath(outside / "moved", path.parent))


def _to_nothing(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "new")


def _to_itself(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _within(path: Path, outside: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _hard_link(path: Path, outside: Path) -> None:
    path.unlink()
    os.link(outside / "canary", path)


def _pipe(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path, outside: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path, outside: Path) -> None:
    path.unlink()
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


def _folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a link to a copy": _to_copy,
    "a link to another file": _to_canary,
    "a relative link": _upwards,
    "a dangling link": _to_nothing,
    "a link to itself": _to_itself,
    "a link within": _within,
    "a hard link": _hard_link,
    "a pipe": _pipe,
    "a socket": _socket,
    "a folder": _folder,
    "a device": _device,
}
FOLDER_KINDS = {name: KINDS[name] for name in ("a link to a copy", "a relative link", "a link within")}


def instead(kind: Callable[[Path, Path], None], pattern: str) -> Attack:
    """Put something else in the place of a file or folder."""

    def attack(root: Path) -> None:
        path = root / (only(root, pattern) if "*" in pattern else pattern)
        if pattern in ("staging", "claims"):
            path.mkdir(exist_ok=True)
            (path / "canary").write_bytes(b"canary")
        kind(path, root.parent / "outside")

    return attack
