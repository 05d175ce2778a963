import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    LlamaConfig,
    Qwen2Config,
    Qwen2VLTextConfig,
    Qwen3_5TextConfig,
)

from distill.losses import linear_ce_kl
from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator.joint_sequence import joint_turns, plan_joint_sequence
from tests.recalibrator.small_recalibrators import (
    FAMILIES,
    SMALL,
    STUDENT,
    TEACHER,
    TURNS,
    make_recalibrator,
    random_rows,
    run,
)


def count_parameters(student_config, **options):
    with torch.device("meta"):
        module = Recalibrator(RecalibratorConfig(student_config=student_config, teacher_hidden=8192, **options))
    return sum(parameter.numel() for parameter in module.parameters())


QWEN2_VL_7B = Qwen2VLTextConfig(
    hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28
)
INTERNVL2_5_8B = LlamaConfig(
    hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, num_hidden_layers=32
)


@pytest.mark.parametrize(("config", "expected"), [(QWEN2_VL_7B, 524_835_840), (INTERNVL2_5_8B, 503_332_864)])
def test_parameter_counts_are_the_papers(config, expected):
    assert count_parameters(config, output_norm="none") == expected
    assert count_parameters(config) == expected + 2 * 8192
    assert count_parameters(config, output_norm="rmsnorm") == expected + 8192
    biases = 8192 + config.hidden_size
    assert count_parameters(config, output_norm="none", projection_bias=True) == expected + biases


def test_fresh_weights_have_the_students_std(student_config):
    module = Recalibrator(RecalibratorConfig(student_config=student_config, teacher_hidden=2048))
    for weight in (module.pre_projection.weight, module.post_projection.weight, module.blocks[0].mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(student_config.initializer_range, rel=0.1)
    assert len(module.blocks) == 2


def test_matches_the_families_own_text_model(student_config):
    module = make_recalibrator(student_config, output_norm="none")
    reference_config = type(student_config).from_dict(
        student_config.to_dict() | {"num_hidden_layers": 2, "layer_types": None}
    )
    reference = AutoModel.from_config(reference_config).double()
    reference.layers.load_state_dict(module.blocks.state_dict())
    reference.norm = nn.Identity()
    questions, answers = random_rows(TURNS[:1])
    output = run(module, questions, answers, TURNS[:1])
    joint = torch.cat([questions[:3], answers[:2] @ module.pre_projection.weight.T])
    joint = torch.cat([joint, questions[3:], answers[2:] @ module.pre_projection.weight.T])
    states = reference(inputs_embeds=joint[None], use_cache=False).last_hidden_state[0]
    expected = states[[2, 3, 6, 7, 8, 9]] @ module.post_projection.weight.T
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_own_positions_are_those_of_the_models(student_config):
    module = make_recalibrator(student_config, positions="own")
    turns = [
        joint_turns([(3, 5), (9, 11)], answer_spans=[(20, 22), (40, 44)]),
        joint_turns([(5, 6)], answer_spans=[(7, 8)]),
    ]
    rows = random_rows(turns)
    plan = plan_joint_sequence(turns)
    own = [0, 1, 2, 20, 21, 5, 6, 7, 8, 40, 41, 42, 43, 0, 1, 2, 3, 4, 7]
    joint = make_recalibrator(student_config)
    given = dataclasses.replace(plan, positions=torch.tensor(own))
    assert torch.equal(module(*rows, plan, questions_from="student"), joint(*rows, given, questions_from="student"))
    assert not torch.allclose(
        module(*rows, plan, questions_from="student"), joint(*rows, plan, questions_from="student")
    )


def test_rope_theta_is_the_students_unless_given(student_config):
    for given in (None, 123.0):
        module = Recalibrator(
            RecalibratorConfig(student_config=student_config, teacher_hidden=TEACHER, rope_theta=given)
        )
        theta = given or student_config.rope_parameters["rope_theta"]
        width = getattr(student_config, "head_dim", None) or STUDENT // 4
        expected = theta ** (-torch.arange(0, width, 2) / width)
        torch.testing.assert_close(module.rotary.rotary.inv_freq, expected)


def test_names_in_checkpoints():
    module = Recalibrator(RecalibratorConfig(student_config=FAMILIES["qwen2"], teacher_hidden=TEACHER, num_blocks=1))
    assert set(module.state_dict()) == {
        "pre_projection.weight",
        "post_projection.weight",
        "output_norm.weight",
        "output_norm.bias",
        "blocks.0.input_layernorm.weight",
        "blocks.0.post_attention_layernorm.weight",
        *(f"blocks.0.self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")),
        "blocks.0.self_attn.o_proj.weight",
        *(f"blocks.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_teacher_questions_go_through_the_same_projection(student_config):
    module = make_recalibrator(student_config)
    questions, answers = random_rows(TURNS, question_width=TEACHER)
    from_teacher = run(module, questions, answers, TURNS, "teacher")
    from_student = run(module, module.pre_projection(questions), answers, TURNS)
    torch.testing.assert_close(from_teacher, from_student)


@pytest.mark.parametrize("term", ["ce_loss", "kl_loss"])
def test_distillation_terms_reach_the_students_question_rows(student_config, term):
    module = make_recalibrator(student_config)
    questions, answers = random_rows(TURNS)
    questions.requires_grad_()
    plan = plan_joint_sequence(TURNS)
    rows = module(questions, answers, plan, questions_from="student")
    losses = linear_ce_kl(
        rows,
        teacher_rows=torch.randn_like(rows),
        weight=torch.randn(50, TEACHER, dtype=torch.float64),
        labels=torch.arange(len(rows)),
    )
    getattr(losses, term)[plan.boundary_mask].sum().backward()
    assert (questions.grad.abs().sum(1) > 1e-6).all()


def test_gradients_match_finite_differences(student_config):
    module = make_recalibrator(student_config)
    rows = random_rows(TURNS)
    plan = plan_joint_sequence(TURNS)
    weights = torch.randn(10, TEACHER, dtype=torch.float64)
    for index in range(2):
        direction = torch.randn_like(rows[index])

        def loss(rows_along_direction, index=index):
            inputs = [rows_along_direction if i == index else rows[i] for i in range(2)]
            return (weights * module(*inputs, plan, questions_from="student")).sum()

        leaf = rows[index].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        step = 1e-3 * direction
        difference = (loss(leaf.detach() + step) - loss(leaf.detach() - step)) / 2e-3
        # The families' norms compute in float32 whatever the rows are.
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=5e-3, atol=5e-3)


def test_gradient_checkpointing_changes_no_number(student_config):
    results = []
    for gradient_checkpointing in (False, True):
        module = make_recalibrator(student_config, gradient_checkpointing=gradient_checkpointing)
        questions, answers = random_rows(TURNS)
        output = run(module, questions.requires_grad_(), answers, TURNS)
        output.square().sum().backward()
        results.append([output, questions.grad, *(parameter.grad for parameter in module.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_rotary_frequencies_stay_float32_in_bf16(student_config):
    module = Recalibrator(RecalibratorConfig(student_config=student_config, teacher_hidden=TEACHER))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to(torch.bfloat16)
    assert before
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])
    questions, answers = random_rows(TURNS)
    assert run(module, questions, answers, TURNS).dtype is torch.bfloat16


def test_sliding_window_and_length_scaling_of_the_student_are_not_inherited():
    plain = make_recalibrator(LlamaConfig(**SMALL))
    scaled = LlamaConfig(
        **SMALL,
        max_position_embeddings=4,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    window = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=2, max_window_layers=0)
    rows = random_rows(TURNS)
    assert torch.equal(run(make_recalibrator(scaled), *rows, TURNS), run(plain, *rows, TURNS))
    assert torch.equal(
        run(make_recalibrator(window), *rows, TURNS), run(make_recalibrator(FAMILIES["qwen2"]), *rows, TURNS)
    )


def test_hybrid_students_give_attention_blocks():
    config = Qwen3_5TextConfig(**SMALL, head_dim=8, layer_types=["linear_attention"] * 2 + ["full_attention"])
    module = make_recalibrator(config)
    assert all(hasattr(block, "self_attn") for block in module.blocks)
    questions, answers = random_rows(TURNS[2:])
    before, after = (run(module, questions, rows, TURNS[2:]) for rows in (answers, answers + 1))
    assert torch.equal(before[0], after[0])


def test_blocks_can_start_from_the_students_last_layers(student_config):
    student = AutoModel.from_config(student_config).double()
    module = make_recalibrator(student_config)
    module.copy_blocks(student.layers)
    for block, layer in zip(module.blocks, student.layers[-2:], strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(block.state_dict()[name], value)
    with pytest.raises(ValueError, match="cannot start 2 Recalibrator blocks from 1"):
        module.copy_blocks(student.layers[:1])


def test_the_students_config_is_left_alone(student_config):
    before = student_config.to_dict()
    make_recalibrator(student_config)
    assert student_config.to_dict() == before


def test_output_norm_options():
    outputs = {
        kind: run(
            Recalibrator(
                RecalibratorConfig(student_config=FAMILIES["llama"], teacher_hidden=TEACHER, output_norm=kind)
            ),
            *random_rows(TURNS),
            TURNS,
        )
        for kind in ("layernorm", "rmsnorm", "none")
    }
    torch.testing.assert_close(outputs["layernorm"].mean(-1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["rmsnorm"].square().mean(-1), torch.ones(10), atol=0.05, rtol=0)
    assert outputs["none"].square().mean() < 0.1
