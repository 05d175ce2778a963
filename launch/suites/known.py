"""Names under which people know benchmarks, and the tasks of lmms-eval 0.7.3 that they are."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownSuite:
    """A benchmark as papers call it, and what lmms-eval makes of it."""

    name: str
    task: str
    """Task or group of lmms-eval."""
    metric: str
    """The figure that papers give, among those that the task returns."""
    full_score: float = 1.0
    """What a model gets that is right throughout: tasks return fractions or percentages."""
    judge: bool = False
    """Whether a judge model reads the answers, or those that no rule can read."""


KNOWN_SUITES = (
    KnownSuite(name="MMMU", task="mmmu_val", metric="mmmu_acc"),
    KnownSuite(name="MMMU-Pro", task="mmmu_pro", metric="mmmu_acc"),
    KnownSuite(name="MMB", task="mmbench_en_dev", metric="gpt_eval_score", full_score=100, judge=True),
    KnownSuite(name="MMB-static", task="mmbench_en_dev_static", metric="gpt_eval_score", full_score=100),
    KnownSuite(name="MMB-CN", task="mmbench_cn_dev", metric="gpt_eval_score", full_score=100, judge=True),
    KnownSuite(
        name="MathVista", task="mathvista_testmini_format", metric="llm_as_judge_eval", full_score=100, judge=True
    ),
    KnownSuite(name="MM-Vet", task="mmvet", metric="gpt_eval_score", full_score=100, judge=True),
    KnownSuite(name="MM-Vet-v2", task="mmvetv2", metric="gpt_eval_score", full_score=100, judge=True),
    KnownSuite(name="MMStar", task="mmstar", metric="average"),
    KnownSuite(name="AI2D", task="ai2d", metric="exact_match"),
    KnownSuite(name="ChartQA", task="chartqa", metric="relaxed_overall"),
    KnownSuite(name="SEED", task="seedbench", metric="seed_image"),
    KnownSuite(name="SEED-2-Plus", task="seedbench_2_plus", metric="seedbench_2_plus_all"),
    KnownSuite(name="RealWorldQA", task="realworldqa", metric="exact_match"),
    KnownSuite(name="BLINK", task="blink", metric="blink_acc"),
)


def known_suite(name: str) -> KnownSuite | None:
    """Return the benchmark of a name, however it is spelt: `MM-Vet`, `mm_vet` and `mmvet` are one."""
    wanted = _letters(name)
    return next((suite for suite in KNOWN_SUITES if _letters(suite.name) == wanted), None)


def suite_of_task(task: str) -> KnownSuite | None:
    """Return the benchmark that a task of lmms-eval is, None for one that has no other name."""
    return next((suite for suite in KNOWN_SUITES if suite.task == task), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
