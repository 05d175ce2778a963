"""A sample as the student and the teacher see it."""

from dataclasses import dataclass

from teacher_cache.schema import EncodedConversation, TeacherTargets


@dataclass(frozen=True, kw_only=True)
class JoinedSample:
    """One sample as the student and the teacher see it."""

    encoded: EncodedConversation
    targets: TeacherTargets | None
    """None in stages that learn from the student's own labels alone."""
    weight: float = 1.0
    """0 for a filler, which makes every process call the same modules and adds nothing to any loss."""

    @property
    def teacher(self) -> TeacherTargets:
        """The teacher's targets, in stages that have them."""
        assert self.targets is not None
        return self.targets
