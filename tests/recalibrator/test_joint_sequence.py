import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalibrator.joint_sequence import (
    Turn,
    joint_turns,
    plan_joint_sequence,
    question_positions,
    shuffle_questions,
    split_tier_a,
    teacher_question_index,
)

turns_of_batch = st.lists(
    st.lists(st.tuples(*[st.integers(1, 5)] * 2).map(lambda counts: Turn(*counts)), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)
spans_of_sample = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


def spans_from(gaps_and_lengths):
    spans, position = [], 0
    for gap, length in gaps_and_lengths:
        spans.append((position + gap, position + gap + length))
        position += gap + length
    return spans


@given(turns_of_batch)
def test_slots_spell_each_sample_question_first_then_answer(turns):
    plan = plan_joint_sequence(turns)
    row = ["unused"] * len(plan.positions)
    questions = [f"q{s}.{t}.{i}" for s, ts in enumerate(turns) for t, turn in enumerate(ts) for i in range(turn[0])]
    answers = [f"a{s}.{t}.{i}" for s, ts in enumerate(turns) for t, turn in enumerate(ts) for i in range(turn[1])]
    for name, slot in zip(questions, plan.question_slots.tolist(), strict=True):
        row[slot] = name
    for name, slot in zip(answers, plan.answer_slots.tolist(), strict=True):
        row[slot] = name
    expected = [
        f"{side}{sample}.{t}.{i}"
        for sample, sample_turns in enumerate(turns)
        for t, turn in enumerate(sample_turns)
        for side, count in (("q", turn.num_question_rows), ("a", turn.num_answer_rows))
        for i in range(count)
    ]
    assert row == expected
    samples = [int(name[1:].partition(".")[0]) for name in row]
    assert plan.lengths == tuple(samples.count(sample) for sample in range(len(turns)))
    assert plan.offsets.dtype is torch.int32  # what flash-attention takes
    assert plan.offsets.diff().tolist() == list(plan.lengths)
    assert plan.samples_of(torch.arange(len(row))).tolist() == samples
    assert plan.positions.tolist() == [i for length in plan.lengths for i in range(length)]
    predicted_by = [row[slot] for slot in plan.predicting_slots.tolist()]
    expected_predictors, expected_boundary = [], []
    for s, sample_turns in enumerate(turns):
        for t, turn in enumerate(sample_turns):
            expected_predictors += [f"q{s}.{t}.{turn[0] - 1}"] + [f"a{s}.{t}.{i}" for i in range(turn[1] - 1)]
            expected_boundary += [True] + [False] * (turn[1] - 1)
    assert predicted_by == expected_predictors
    assert plan.boundary_mask.tolist() == expected_boundary


@given(st.lists(st.tuples(spans_of_sample, spans_of_sample), min_size=1, max_size=3))
def test_own_positions_are_those_of_the_models_tokens(samples):
    spans = [(spans_from(question), spans_from(answer)) for question, answer in samples if len(question) == len(answer)]
    if not spans:
        return
    plan = plan_joint_sequence([joint_turns(question, answer_spans=answer) for question, answer in spans])
    questions = [position for question, _ in spans for position in question_positions(question).tolist()]
    answers = [position for _, answer in spans for start, stop in answer for position in range(start, stop)]
    assert plan.own_positions[plan.question_slots].tolist() == questions
    assert plan.own_positions[plan.answer_slots].tolist() == answers


@pytest.mark.parametrize("turns", [[[]], [[Turn(0, 2)]], [[Turn(2, 1), Turn(1, 0)]]])
def test_turns_without_question_or_answer_rows_are_refused(turns):
    with pytest.raises(ValueError, match="bad turns of sample 0"):
        plan_joint_sequence(turns)


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        plan_joint_sequence([])


@given(spans_of_sample)
def test_question_positions_are_all_tokens_before_the_last_answer_outside_answers(gaps_and_lengths):
    spans = spans_from(gaps_and_lengths)
    inside = {position for start, stop in spans for position in range(start, stop)}
    assert question_positions(spans).tolist() == [p for p in range(spans[-1][1]) if p not in inside]


@given(spans_of_sample, st.integers(0, 3))
def test_teacher_question_rows_are_found_in_both_tiers(gaps_and_lengths, trailing):
    spans = spans_from(gaps_and_lengths)
    num_tokens = spans[-1][1] + trailing
    tier_a = [position for start, stop in spans for position in range(start - 1, stop)]
    tier_q = [position for position in range(num_tokens) if position not in tier_a]
    rows = torch.tensor(tier_a + tier_q)
    assert rows[teacher_question_index(spans)].tolist() == question_positions(spans).tolist()


@given(spans_of_sample)
def test_tier_a_splits_into_predicting_and_answer_rows(gaps_and_lengths):
    spans = spans_from(gaps_and_lengths)
    tier_a = torch.tensor([position for start, stop in spans for position in range(start - 1, stop)])
    index = split_tier_a([stop - start for start, stop in spans])
    assert tier_a[index.answer].tolist() == [p for start, stop in spans for p in range(start, stop)]
    assert tier_a[index.predicting].tolist() == [p - 1 for start, stop in spans for p in range(start, stop)]


def test_joint_turns_pair_student_questions_with_teacher_answers():
    assert joint_turns([(4, 6), (9, 12)], answer_spans=[(7, 12), (20, 21)]) == (Turn(4, 5, 0, 7), Turn(3, 1, 6, 20))


def test_different_turn_counts_are_refused():
    with pytest.raises(ValueError, match="2 on the question side, 1 in the teacher's"):
        joint_turns([(4, 6), (9, 12)], answer_spans=[(7, 12)])


@pytest.mark.parametrize("spans", [[(0, 2)], [(2, 2)], [(2, 4), (4, 6)], [(4, 6), (1, 3)]])
def test_spans_without_a_question_before_them_are_refused(spans):
    with pytest.raises(ValueError, match="bad answer spans"):
        question_positions(spans)


def test_shuffled_questions_come_from_the_next_sample():
    turns = [[Turn(2, 1, 0, 10), Turn(1, 3, 7, 20)], [Turn(3, 2, 0, 30)]]
    questions = ["a0", "a1", "b0", "c0", "c1", "c2"]
    shuffled = shuffle_questions(turns)
    assert shuffled.turns == ((Turn(3, 1, 0, 10), Turn(3, 3, 0, 20)), (Turn(2, 2, 0, 30),))
    rows = [questions[i] for i in shuffled.question_rows.tolist()]
    assert rows == ["c0", "c1", "c2", "c0", "c1", "c2", "a0", "a1"]
    assert len(plan_joint_sequence(shuffled.turns).question_slots) == len(rows)


def test_one_sample_has_no_other_questions():
    with pytest.raises(ValueError, match="at least 2 samples"):
        shuffle_questions([[Turn(1, 1)]])
