"""What a pool of actors is given: the pieces of work that wait, and how a piece is begun, named and finished."""

from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

Piece = TypeVar("Piece")
GivenPiece = TypeVar("GivenPiece", contravariant=True)


class PieceQueue(Generic[Piece]):
    """The pieces that nobody works on."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = deque(pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def take(self) -> Piece | None:
        """Take the next piece; None while there is none to work on."""
        return self.pieces.popleft() if self.pieces else None

    def put_back(self, piece: Piece) -> None:
        """Have a piece tried again, behind all others: what failed may fail there again, and others come first."""
        self.pieces.append(piece)

    def drop_done_elsewhere(self) -> int:
        """Forget the pieces that others have done; return the number of their samples."""
        return 0


class Work(Protocol[GivenPiece]):
    """What a pool does."""

    unit: str
    """What a piece is called."""

    def start_actor(self) -> Any:
        """Return a new actor whose ``ready`` ends once Ray has placed it."""
        ...

    def begin(self, actor: Any, piece: GivenPiece) -> Any:
        """Return the stream of an actor's signs: any number of PieceProgress, then a result with ``tokens``.

        The first sign says that the actor's engine runs.
        """
        ...

    def num_samples(self, piece: GivenPiece) -> int:
        """Return the samples of a piece."""
        ...

    def name(self, piece: GivenPiece) -> str:
        """Return how messages call a piece."""
        ...

    def finish(self, piece: GivenPiece, result: Any) -> None:
        """Take in a piece that is done."""
        ...

    def give_up(self, piece: GivenPiece) -> None:
        """Let go of a piece that failed too often."""
        ...

    def figures(self) -> dict[str, int]:
        """Return what progress shows beside the rate and the missing pieces."""
        ...

    def check_stop(self, *, num_missing: int) -> None:
        """Raise where the work is to end early."""
        ...
