import dataclasses

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, GptOssConfig, LlamaModel, Qwen3_5TextConfig

from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator.joint_sequence import plan_joint_sequence
from tests.recalibrator.small_recalibrators import (
    FAMILIES,
    SMALL,
    TEACHER,
    TURNS,
    make_recalibrator,
    random_rows,
    run,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: (q[:-1], a), "question rows from the student do not fit"),
        (lambda q, a: (q, a[:-1]), "answer rows do not fit"),
        (lambda q, a: (q[:, :-1], a), "question rows from the student do not fit"),
    ],
)
def test_rows_that_do_not_fit_the_plan_are_refused(change, message):
    module = make_recalibrator(FAMILIES["llama"])
    questions, answers = change(*random_rows(TURNS))
    with pytest.raises(ValueError, match=message):
        run(module, questions, answers, TURNS)


@pytest.mark.parametrize(
    ("side", "row", "value", "message"),
    [
        (
            0,
            7,
            float("nan"),
            r"question rows from the student hold NaN.*: 1 of 11 rows of width 32.*row 7, of sample 1 in",
        ),
        (1, 9, float("inf"), r"answer rows hold NaN.*: 1 of 10 rows of width 24.*row 9, of sample 2 in"),
    ],
)
def test_rows_that_are_not_finite_are_refused(side, row, value, message):
    rows = random_rows(TURNS)
    rows[side][row, 3] = value
    with pytest.raises(ValueError, match=message):
        run(make_recalibrator(FAMILIES["llama"]), *rows, TURNS)


def test_rows_that_the_caller_has_looked_at_are_not_looked_at_again():
    questions, answers = random_rows(TURNS)
    questions[7, 3] = float("nan")
    module, plan = make_recalibrator(FAMILIES["llama"]), plan_joint_sequence(TURNS)
    rows = module(questions, answers, plan, questions_from="student", are_finite=True)
    assert rows.isnan().any(dim=1).tolist() == [False] * 6 + [True] + [False] * 3


def test_finite_rows_whose_sum_is_not_are_accepted():
    questions, answers = (rows.float() for rows in random_rows(TURNS))
    run(make_recalibrator(FAMILIES["llama"]).float(), torch.full_like(questions, 1e38), answers, TURNS)


def test_a_family_with_attention_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaModel, "_can_set_attn_implementation", lambda body: False)
    with pytest.raises(ValueError, match=r"'llama'.*attention of its own in LlamaModel"):
        Recalibrator(RecalibratorConfig(student_config=FAMILIES["llama"], teacher_hidden=TEACHER))


def test_families_with_several_rotary_bases_are_refused():
    config = Gemma3TextConfig(**SMALL, pad_token_id=0)
    with pytest.raises(ValueError, match=r"gemma3_text.*expected one rotary embedding"):
        Recalibrator(RecalibratorConfig(student_config=config, teacher_hidden=TEACHER))


def test_families_that_transformers_gives_no_such_attention_are_refused():
    config = GptOssConfig(**SMALL, pad_token_id=0, head_dim=8)
    with pytest.raises(ValueError, match=r"'gpt_oss': expected a text model of 2 layers.*GptOssModel does not support"):
        Recalibrator(RecalibratorConfig(student_config=config, teacher_hidden=TEACHER))


def test_blocks_do_not_start_from_linear_attention():
    config = Qwen3_5TextConfig(
        **SMALL, head_dim=8, layer_types=["full_attention", "linear_attention", "full_attention"]
    )
    module, layers = make_recalibrator(config), AutoModel.from_config(config).layers
    with pytest.raises(ValueError, match=r"the last 2 student layers: one has other weights \(linear_attn, "):
        module.copy_blocks(layers)


@pytest.mark.parametrize(
    "bad",
    [{"num_blocks": 0}, {"teacher_hidden": 0}, {"output_norm": "batchnorm"}, {"positions": "2d"}, {"rope_theta": 0}],
)
def test_bad_config_is_refused(bad):
    config = RecalibratorConfig(student_config=FAMILIES["llama"], teacher_hidden=TEACHER)
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(config, **bad)
