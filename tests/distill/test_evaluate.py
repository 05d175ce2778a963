import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import transformers

from distill.evaluate import (
    EvaluationSettings,
    answer_texts,
    bits_per_byte,
    evaluate_model,
    generate_answers,
    greedy,
    load_chat_model,
)
from distill.scoring import (
    SampleRow,
    agreement,
    exact_match,
    normalize_answer,
    read_result,
    read_sample_rows,
    reference_answer,
)
from teacher_cache.chat import encode_conversation
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError, DataError, SampleError
from teacher_cache.samples import read_samples
from teacher_cache.schema import Message, Sample
from tests.teacher_cache.chat_templates import CHATML_THINKING

SETTINGS = EvaluationSettings(batch_size=2, max_new_tokens=4, dtype="float32")
FAMILIES = ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava"]
QUESTIONS = [
    ("Is any digit repeated?", "Yes, the digit five occurs twice.", "repeat"),
    ("What is the sum of the top row? Answer with a numeral.", "12", "sum"),
    ("Describe the image.", "The top row has seven and three, the bottom row has zero and nine.", "describe"),
    ("Which digit is the largest? Answer with one word.", "nine", "largest"),
    ("How many digits are greater than four? Answer in a sentence, please, and be brief.", "Two are.", "count"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Five questions of different lengths; one has two images, one is about a wider image, one has no image."""
    random = np.random.default_rng(0)
    rows = []
    for index, (question, answer, family) in enumerate(QUESTIONS):
        shapes = {0: [(16, 16), (16, 16)], 1: [(16, 32)], 3: []}.get(index, [(16, 16)])
        images = [png(random.integers(0, 256, size=(*shape, 3), dtype=np.uint8)) for shape in shapes]
        messages = [
            {"role": "user", "content": "<image>" * len(images) + question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"id": f"q{index}", "messages": messages, "images": images, "family": family, "facts": [answer]})
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return DataConfig(path=str(path))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_answers_equal_single_ones(family: str, data: DataConfig, request: pytest.FixtureRequest) -> None:
    chat = load_chat_model(request.getfixturevalue(family), settings=SETTINGS)
    samples = read_samples(data).samples
    alone = generate_answers(
        chat, samples=samples, settings=EvaluationSettings(batch_size=1, max_new_tokens=12, dtype="float32")
    )
    together = generate_answers(
        chat, samples=samples, settings=EvaluationSettings(batch_size=5, max_new_tokens=12, dtype="float32")
    )
    assert together == alone
    assert list(together) == [sample.sample_id for sample in samples]
    assert len(set(alone.values())) > 1, "equal answers everywhere would show nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_a_loop_without_cache(family: str, data: DataConfig, request: pytest.FixtureRequest) -> None:
    chat = load_chat_model(request.getfixturevalue(family), settings=SETTINGS)
    sample = read_samples(data).samples[2]
    encoded = encode_conversation(chat.processor, sample, max_length=512)
    ids = torch.from_numpy(encoded.token_ids[: encoded.spans[0].start]).long()[None]
    images = {k: v for k, v in encoded.model_inputs.items() if k != "mm_token_type_ids"}
    answer: list[int] = []
    for _ in range(8):
        inputs = dict(images)
        if "mm_token_type_ids" in encoded.model_inputs:
            kinds = encoded.model_inputs["mm_token_type_ids"][:, : encoded.spans[0].start]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer)))
        with torch.inference_mode():
            token = int(chat.model(input_ids=ids, **inputs, use_cache=False).logits[0, -1].argmax())
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token in chat.model.generation_config.eos_token_id:
            break
    expected = chat.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    settings = EvaluationSettings(batch_size=2, max_new_tokens=8, dtype="float32")
    assert generate_answers(chat, samples=[sample], settings=settings) == {sample.sample_id: expected}


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_per_byte_equals_a_hand_computation(family: str, data: DataConfig, request: pytest.FixtureRequest) -> None:
    chat = load_chat_model(request.getfixturevalue(family), settings=SETTINGS)
    samples = read_samples(data).samples
    nats = 0.0
    for sample in samples:
        encoded = encode_conversation(chat.processor, sample, max_length=512)
        ids = torch.from_numpy(encoded.token_ids).long()[None]
        with torch.inference_mode():
            logits = chat.model(input_ids=ids, **encoded.model_inputs, use_cache=False).logits[0].double().numpy()
        for span in encoded.spans:
            for position in range(span.start, span.stop):
                row = logits[position - 1]
                nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[encoded.token_ids[position]]
    expected = nats / math.log(2) / sum(len(answer.encode()) for _, answer, _ in QUESTIONS)
    for batch_size in (1, 5):
        settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=1, dtype="float32")
        found = bits_per_byte(chat, samples=samples, max_length=512, settings=settings)
        assert found == pytest.approx(expected, rel=1e-5)


def thinking_aloud(path: Path, target: Path) -> Path:
    """Copy a text model whose template puts an empty thinking before the last answer."""
    shutil.copytree(path, target)
    (target / "chat_template.jinja").write_text(CHATML_THINKING)
    return target


def test_thinking_is_neither_scored_nor_counted(tiny_qwen2: Path, tmp_path: Path) -> None:
    chat = load_chat_model(thinking_aloud(tiny_qwen2, tmp_path / "model"), settings=SETTINGS)
    messages = (Message(role="user", content=("Sum?",)), Message(role="assistant", content=("seven",)))
    sample = Sample(sample_id="s", messages=messages, images=(), digest="")
    encoded = encode_conversation(chat.processor, sample, max_length=512)
    ids = torch.from_numpy(encoded.token_ids).long()[None]
    ((start, stop),) = encoded.spans
    # a model that says exactly what it was trained to say
    (text,) = answer_texts(chat.processor, ids[:, start:stop], prompt_length=0)
    row = SampleRow(sample_id="s", reference=reference_answer(sample), columns={})
    assert exact_match(row, text) == 1.0
    with torch.inference_mode():
        logprobs = chat.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    counted = range(start + encoded.num_thinking[0], stop)
    nats = -sum(float(logprobs[position - 1, ids[0, position]]) for position in counted)
    found = bits_per_byte(chat, samples=[sample], max_length=512, settings=SETTINGS)
    assert found == pytest.approx(nats / math.log(2) / len("seven"), rel=1e-5)


def test_generation_ends_with_the_turn_of_the_template(tiny_qwen2: Path) -> None:
    chat = load_chat_model(tiny_qwen2, settings=SETTINGS)
    own = transformers.GenerationConfig(eos_token_id=3, temperature=0.7, do_sample=True)
    config = greedy(own, processor=chat.processor)
    assert config.eos_token_id == [3, chat.processor.convert_tokens_to_ids("<|im_end|>")]
    assert (config.do_sample, config.temperature) == (False, None)


def test_bits_per_byte_refuses_a_sample_that_does_not_fit(tiny_llava: Path, data: DataConfig) -> None:
    chat = load_chat_model(tiny_llava, settings=SETTINGS)
    with pytest.raises(SampleError, match="max_length"):
        bits_per_byte(chat, samples=read_samples(data).samples, max_length=20, settings=SETTINGS)


def test_evaluation_of_a_text_model_is_written_and_read_back(tiny_qwen2: Path, tmp_path: Path) -> None:
    data_path = tmp_path / "text.jsonl"
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a, _ in QUESTIONS]
    data_path.write_text("".join(json.dumps({"messages": row, "family": "text"}) + "\n" for row in messages))
    config = DataConfig(path=str(data_path))
    teacher = evaluate_model(tiny_qwen2, name="teacher", data=config, settings=SETTINGS)
    result = evaluate_model(
        tiny_qwen2,
        name="student",
        data=config,
        settings=SETTINGS,
        output_path=tmp_path / "evaluation" / "student.json",
        teacher_answers=teacher.answers,
        scorer=lambda row, answer: 0.5,
    )
    assert read_result(tmp_path / "evaluation" / "student.json") == result
    assert list((tmp_path / "evaluation").iterdir()) == [tmp_path / "evaluation" / "student.json"]
    assert result.accuracy_by_family == {"text": 0.5}
    assert (result.accuracy, result.teacher_agreement, result.num_samples) == (0.5, 1.0, 5)
    assert result.answers == teacher.answers


def test_a_scorer_sees_the_further_columns(tiny_llava: Path, data: DataConfig) -> None:
    seen: dict[str, SampleRow] = {}

    def scorer(row: SampleRow, answer: str) -> float:
        seen[row.sample_id] = row
        return float(row.columns["family"] in ("sum", "count"))

    result = evaluate_model(tiny_llava, name="x", data=data, scorer=scorer, settings=SETTINGS)
    assert result.accuracy == pytest.approx(0.4)
    assert result.accuracy_by_family == {"count": 1.0, "describe": 0.0, "largest": 0.0, "repeat": 0.0, "sum": 1.0}
    assert result.scores == {"q0": 0.0, "q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 1.0}
    assert seen["q1"].columns["facts"] == ["12"]
    assert seen["q1"].reference == "12"
    assert result.teacher_agreement is None


def test_rows_without_an_id_and_with_bad_neighbours_keep_their_columns(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "family": "bad"},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "family": "good"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(path), max_skipped_samples=1)
    (row,) = read_sample_rows(config, samples=read_samples(config).samples)
    assert (row.columns["family"], row.reference) == ("good", "c")


def test_a_checkpoint_without_all_weights_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    for file in tiny_llava.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tiny_llava / "model.safetensors")
    weights = {key: value for key, value in weights.items() if "lm_head" not in key}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lm_head"):
        load_chat_model(tmp_path, settings=SETTINGS)


@pytest.mark.parametrize(
    ("answer", "score"), [("Seven.", 1.0), ("  SEVEN \n", 1.0), ("seven three", 0.0), ("", 0.0), ("\uff33even", 1.0)]
)
def test_exact_match_ignores_case_form_and_surrounding_punctuation(answer: str, score: float) -> None:
    assert exact_match(SampleRow(sample_id="x", reference="seven", columns={}), answer) == score


def test_normalisation_keeps_inner_punctuation() -> None:
    assert normalize_answer(" 3.5,  7! ") == "3.5, 7"


def test_agreement_needs_every_teacher_answer() -> None:
    assert agreement({"a": "Two.", "b": "x"}, teacher_answers={"a": "two", "b": "y", "c": "z"}) == 0.5
    with pytest.raises(DataError, match="lack 1 sample"):
        agreement({"a": "Two.", "d": "x"}, teacher_answers={"a": "two"})


def test_a_damaged_result_file_names_itself(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json"):
        read_result(tmp_path / "x.json")
