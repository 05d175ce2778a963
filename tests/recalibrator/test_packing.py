import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recalibrator import attention
from recalibrator.attention import per_sample_sdpa
from recalibrator.joint_sequence import Turn
from tests.recalibrator.small_recalibrators import SMALL, TURNS, make_recalibrator, random_rows, run

BATCHES = {
    "turns": TURNS,
    "lengths": [[Turn(90, 3), Turn(4, 40)], [Turn(1, 1)], [Turn(1, 30)], [Turn(2, 1)]],
    "one length": [[Turn(3, 2)], [Turn(1, 1), Turn(1, 2)], [Turn(4, 1)]],
    "one sample": [[Turn(7, 2), Turn(1, 3)]],
}


def outputs_and_gradients(module, questions, answers, turns):
    """Run each batch of turns on its rows; gradients of a random weighting of all outputs."""
    questions, answers = questions.clone().requires_grad_(), answers.clone().requires_grad_()
    counts = [[sum(turn[side] for turn in sample) for batch in turns for sample in batch] for side in (0, 1)]
    parts = [rows.split(counts[side]) for side, rows in enumerate((questions, answers))]
    outputs, first = [], 0
    for batch in turns:
        rows = [torch.cat(parts[side][first : first + len(batch)]) for side in (0, 1)]
        outputs.append(run(module, *rows, batch))
        first += len(batch)
    output = torch.cat(outputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    named = {"questions": questions, "answers": answers, **dict(module.named_parameters())}
    gradients = torch.autograd.grad((output * weights).sum(), list(named.values()))
    return {"output": output.detach(), **dict(zip(named, gradients, strict=True))}


@pytest.mark.parametrize("turns", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_packed_batch_equals_one_sample_at_a_time(student_config, turns, gradient_checkpointing):
    module = make_recalibrator(student_config, gradient_checkpointing=gradient_checkpointing).float()
    rows = [rows.float() for rows in random_rows(turns)]
    packed = outputs_and_gradients(module, *rows, [turns])
    alone = outputs_and_gradients(module, *rows, [[sample] for sample in turns])
    for name, expected in alone.items():
        # the terms of a key bias's gradient nearly cancel (softmax ignores a shift of all keys), so that it is known to
        # 1e-6 of its terms only, also for one sample at a time
        scale = alone[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else expected
        error = (packed[name] - expected).norm() / scale.norm()
        assert error < 1e-6, f"{name}: relative error {error:.1e}"


def test_experts_get_all_rows_and_see_each_row_alone():
    config = Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    module = make_recalibrator(config).float()
    seen = []
    module.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    rows = [rows.float() for rows in random_rows(TURNS)]
    packed = outputs_and_gradients(module, *rows, [TURNS])
    assert seen == [21]
    alone = outputs_and_gradients(module, *rows, [[sample] for sample in TURNS])
    for name, expected in alone.items():
        assert (packed[name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_no_gradient_reaches_another_sample(student_config):
    module = make_recalibrator(student_config)
    questions, answers = (rows.requires_grad_() for rows in random_rows(TURNS))
    output = run(module, questions, answers, TURNS)
    of_questions, of_answers = torch.autograd.grad(output[6:7].sum(), (questions, answers))
    assert of_questions.any(dim=1).nonzero()[:, 0].tolist() == list(range(5, 10))
    assert not of_answers.any()  # the sample's one answer row is after the row that predicts it


def test_attention_runs_within_samples_and_without_a_mask(student_config, monkeypatch):
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append((query.shape[0], query.shape[2], key.shape[2], attention_mask))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    module = make_recalibrator(student_config)
    run(module, *random_rows(TURNS), TURNS)
    assert calls == [(1, 11, 11, None), (1, 6, 6, None), (1, 4, 4, None)] * 2
    calls.clear()
    run(module, *random_rows(BATCHES["one length"]), BATCHES["one length"])
    assert calls == [(3, 5, 5, None)] * 2


def test_flash_attention_gets_the_samples_offsets(student_config, monkeypatch):
    def varlen(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"]
        assert kwargs["cu_seq_lens_q"].dtype is torch.int32
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(kwargs["cu_seq_lens_q"].diff().tolist())
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        return per_sample_sdpa(
            module, query, key, value, None, sample_lengths=lengths, scaling=kwargs["scaling"], dropout=0.0
        )

    module = make_recalibrator(student_config)
    rows = random_rows(TURNS)
    expected = run(module, *rows, TURNS)
    monkeypatch.setattr(attention, "flash_attention_runs", lambda hidden_states: True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    assert torch.equal(run(module, *rows, TURNS), expected)


def test_the_last_feed_forward_runs_at_the_rows_that_are_read(student_config):
    module = make_recalibrator(student_config)
    rows = random_rows(TURNS)
    seen = []
    for block in module.blocks:
        block.mlp.gate_proj.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    trimmed = run(module, *rows, TURNS)
    assert seen == [21, 10]
    for block in module.blocks:
        block.mlp.experts = None  # looks like a mixture of experts, which gets all rows
    torch.testing.assert_close(run(module, *rows, TURNS), trimmed, rtol=1e-9, atol=1e-9)
    assert seen == [21, 10, 21, 21]
    assert not module.blocks[-1].mlp._forward_hooks
    assert not module.blocks[-1].mlp._forward_pre_hooks


def test_one_samples_rows_change_no_other_sample(student_config):
    module = make_recalibrator(student_config)
    questions, answers = random_rows(TURNS)
    before = run(module, questions, answers, TURNS)
    questions[5:10] += 1
    answers[6:7] -= 1
    after = run(module, questions, answers, TURNS)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[7:], after[7:])
    assert not torch.allclose(before[6:7], after[6:7])


def test_later_rows_change_no_earlier_output(student_config):
    module = make_recalibrator(student_config)
    turns = TURNS[:1]
    questions, answers = random_rows(turns)
    before = run(module, questions, answers, turns)
    answers_changed = answers.clone()
    answers_changed[3] += 1  # row of answer token 1 in turn 1: predicts token 2
    after = run(module, questions, answers_changed, turns)
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])
    questions[3] += 1  # first question row of turn 1
    after = run(module, questions, answers, turns)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:], after[2:])


def test_boundary_row_sees_no_answer_row_of_its_turn(student_config):
    module = make_recalibrator(student_config)
    turns = TURNS[2:]
    questions, answers = random_rows(turns)
    before = run(module, questions, answers, turns)
    after = run(module, questions, answers + 1, turns)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1:], after[1:])


def test_positions_matter_and_restart_in_each_sample(student_config):
    module = make_recalibrator(student_config)
    questions, answers = random_rows([TURNS[0], TURNS[0]])
    questions[5:], answers[6:] = questions[:5].clone(), answers[:6].clone()
    output = run(module, questions, answers, [TURNS[0], TURNS[0]])
    # a matrix product may round the same row differently at another place of the batch
    torch.testing.assert_close(output[:6], output[6:], rtol=0, atol=1e-12)
    swapped = questions[:5].clone()[[1, 0, 2, 3, 4]]
    assert not torch.allclose(run(module, swapped, answers[:6], TURNS[:1]), output[:6])
