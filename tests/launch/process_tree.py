"""What the processes below this one show to others: their command lines, and the sockets on which they listen."""

import os
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

LISTEN = "0A"


class Watch:
    """Looks at all processes below one, many times a second, until the block ends."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.command_lines: set[str] = set()
        self.listening: set[tuple[str, str]] = set()
        """Name of the program, and address."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            sockets = dict(_listening_sockets())
            for process in _descendants(self.root):
                try:
                    line = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    inodes = {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()}
                    name = Path(f"/proc/{process}/comm").read_text().strip()
                except OSError:
                    continue
                self.command_lines.add(line)
                self.listening |= {(name, sockets[inode]) for inode in inodes & sockets.keys()}


def _descendants(root: int) -> list[int]:
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children[parent].append(int(folder.name))
    found, pending = [], [root]
    while pending:
        found.append(pending.pop())
        pending += children[found[-1]]
    return found


def _listening_sockets() -> Iterator[tuple[str, str]]:
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                packed = bytes.fromhex(fields[1].partition(":")[0])
                words = struct.unpack(f"<{len(packed) // 4}I", packed)
                yield f"socket:[{fields[9]}]", socket.inet_ntop(family, struct.pack(f">{len(words)}I", *words))
