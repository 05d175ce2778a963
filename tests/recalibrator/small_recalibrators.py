"""Small Recalibrators of several families, and random rows for them."""

import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config, Qwen2VLTextConfig, Qwen3Config

from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator.joint_sequence import Turn, plan_joint_sequence

TEACHER, STUDENT = 24, 32
SMALL = {
    "hidden_size": STUDENT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen2_vl_text": Qwen2VLTextConfig(**SMALL, rope_parameters=MROPE),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "llama": LlamaConfig(**SMALL),
}
TURNS = [[Turn(3, 2), Turn(2, 4)], [Turn(5, 1)], [Turn(1, 3)]]


def make_recalibrator(student_config, **options):
    torch.manual_seed(0)
    config = RecalibratorConfig(student_config=student_config, teacher_hidden=TEACHER, **options)
    module = Recalibrator(config).double()
    for parameter in module.parameters():  # the fresh std of 0.02 hides attention errors behind tiny weights
        nn.init.normal_(parameter, std=0.3)
    return module


def random_rows(turns, *, question_width=STUDENT, seed=1):
    generator = torch.Generator().manual_seed(seed)
    questions = sum(turn.num_question_rows for sample in turns for turn in sample)
    answers = sum(turn.num_answer_rows for sample in turns for turn in sample)
    return (
        torch.randn(questions, question_width, dtype=torch.float64, generator=generator),
        torch.randn(answers, TEACHER, dtype=torch.float64, generator=generator),
    )


def run(module, questions, answers, turns, questions_from="student"):
    return module(questions, answers, plan_joint_sequence(turns), questions_from=questions_from)
