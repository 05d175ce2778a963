"""Which nodes of a pool fail: starts of engines and attempts at pieces that failed in a row, node by node."""

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class NodeFailures:
    """Counts what failed on each node, and decides which nodes get no further replica."""

    def __init__(self, *, allowed: int) -> None:
        """Leave a node after ``allowed`` failures of one kind in a row."""
        self._allowed = allowed
        self._starts: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()
        self._good: set[str] = set()
        """Nodes that are not avoided and whose last attempt succeeded."""
        self._avoided: set[str] = set()

    def start_succeeded(self, node: str) -> None:
        """Take in that an engine runs."""
        self._starts[node] = 0

    def start_failed(self, node: str, error: BaseException) -> bool:
        """Take in that an engine has not started; tell whether the node is to be avoided from now on."""
        self._starts[node] += 1
        failed = self._starts[node]
        logger.warning("start %d of %d of an engine on node %s failed: %s", failed, self._allowed, node, error)
        return failed >= self._allowed and self._avoid(node)

    def attempt_succeeded(self, node: str) -> None:
        """Take in that a piece is done."""
        self._attempts[node] = 0
        if node not in self._avoided:
            self._good.add(node)

    def attempt_failed(self, node: str) -> bool:
        """Take in that an attempt at a piece failed; tell whether the node is to be avoided from now on.

        It is only where another node gets its pieces done: otherwise the pieces are at fault, or what all nodes share.
        """
        self._attempts[node] += 1
        self._good.discard(node)
        return not self.may_work(node) and bool(self._good) and self._avoid(node)

    def may_work(self, node: str) -> bool:
        """Tell whether fewer attempts in a row failed on a node than are allowed."""
        return self._attempts[node] < self._allowed

    def _avoid(self, node: str) -> bool:
        is_new = node not in self._avoided
        if is_new:
            self._avoided.add(node)
            self._good.discard(node)
            logger.warning("no further replica goes to node %s", node)
        return is_new
