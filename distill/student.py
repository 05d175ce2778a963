"""Load a student, name its parts, run it up to its last hidden states."""

import re
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.adapters import is_adapter
from distill.packing import can_pack, packed_hidden_state
from teacher_cache.errors import ConfigError
from teacher_cache.model_files import refuse_own_code
from teacher_cache.teacher_checkpoint import attention_options

Part = Literal["vision_encoder", "projector", "body", "embeddings", "head", "adapters"]


class LogitOptions(TypedDict):
    """Post-processing of logits: scale first, then soft-cap."""

    logit_scale: float
    logit_softcap: float | None


PROJECTOR = re.compile(
    r"merger|projector|connector|aligner|resampler|mlp1|embed_vision|modality_projection|image_newline"
)


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """Return the local directory of a checkpoint; a repository id is looked up in (or brought to) the hub cache.

    Raises:
        ConfigError: There is no such directory, and no such repository in the hub cache or to be had.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision))
    except errors.HFValidationError as error:
        raise ConfigError(f"no model at {model}: there is no such folder, and no repository has such a name") from error
    except Exception as error:  # the hub's own errors, and whatever the transports below it raise
        offline = "HF_HUB_OFFLINE is set, so that nothing is fetched"
        why = offline if constants.HF_HUB_OFFLINE else str(error).partition("\n")[0] or type(error).__name__
        chosen = model if revision is None else f"{model} --revision {revision}"
        raise ConfigError(
            f"model {model} is not on this machine, neither as a folder nor in {constants.HF_HUB_CACHE}: {why}; "
            f"correct the name or HF_HOME, or fetch it first: `hf download {chosen}`"
        ) from error


def packs(path: Path, *, trust_remote_code: bool = False) -> bool:
    """Return whether a student's samples can share a row."""
    return can_pack(transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def load_student(path: Path, *, dtype: str, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """Load a student with every one of its weights.

    Raises:
        ConfigError: The checkpoint lacks a weight that the architecture needs, one has another shape, or it brings
            code of its own that is not trusted.
    """
    auto, _, options = _model_class(path, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded: Any = auto.from_pretrained(path, output_loading_info=True, **options)
    model, report = loaded
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]))
    if absent:
        raise ConfigError(
            f"{len(absent)} weights of {path} are missing or misshapen, first {absent[0]}: mend the model"
        )
    check_rotary_buffers(model)
    return model


def empty_student(path: Path, *, dtype: str, trust_remote_code: bool) -> transformers.PreTrainedModel:
    """Return a student as ``load_student`` does, but with the values that new modules have."""
    auto, config, options = _model_class(path, dtype=dtype, trust_remote_code=trust_remote_code)
    model: transformers.PreTrainedModel = auto.from_config(config, **options)
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def check_rotary_buffers(model: nn.Module) -> None:
    """Raise ConfigError unless every rotary frequency is float32: bfloat16 ones misplace far tokens."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ConfigError(f"rotary buffer {name} is {buffer.dtype}, expected float32")


def name_parts(model: transformers.PreTrainedModel) -> dict[str, Part]:
    """Return the part that each parameter belongs to; a tied head counts as embeddings.

    Raises:
        ConfigError: A parameter belongs to no known part.
    """
    embeddings = _parameter_ids(model.get_input_embeddings())
    head = _parameter_ids(model.get_output_embeddings()) - embeddings
    decoder = _parameter_ids(model.get_decoder()) - embeddings - head
    encoder = model.get_encoder(modality="image")
    vision = _parameter_ids(encoder) if encoder not in (model, model.base_model) else set()
    if vision & decoder:
        # a wrapper whose decoder is the whole base model: what the vision encoder holds is not the body
        decoder -= vision
    return {
        name: _part_of(name, id(parameter), embeddings=embeddings, head=head, decoder=decoder, vision=vision)
        for name, parameter in model.named_parameters()
    }


def last_hidden_state(
    model: transformers.PreTrainedModel,
    input_ids: Int[Tensor, "batch student_tokens"],
    *,
    attention_mask: Int[Tensor, "batch student_tokens"],
    model_inputs: dict[str, Tensor],
    packed: bool = False,
) -> Float[Tensor, "batch student_tokens student_hidden"]:
    """Return the hidden states after the final norm; the head is not applied. Packed or not decides the speed alone."""
    if packed:
        return packed_hidden_state(model, input_ids, attention_mask=attention_mask, model_inputs=model_inputs)
    outputs = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **model_inputs
    )
    return outputs.last_hidden_state


def logit_options(model: transformers.PreTrainedModel) -> LogitOptions:
    """Return what the model's own head does to its logits beside the projection."""
    text = model.config.get_text_config()
    scaling = getattr(text, "logits_scaling", None)
    scale = getattr(text, "logit_scale", None) or (1.0 / scaling if scaling else 1.0)
    return LogitOptions(logit_scale=float(scale), logit_softcap=getattr(text, "final_logit_softcapping", None))


def _model_class(path: Path, *, dtype: str, trust_remote_code: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Return the auto class, the configuration, and the options for either way to make a model."""
    refuse_own_code(path, trusted=trust_remote_code)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, **attention_options(config)}
    return auto, config, options


def _parameter_ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}


def _part_of(
    name: str, parameter: int, *, embeddings: set[int], head: set[int], decoder: set[int], vision: set[int]
) -> Part:
    if is_adapter(name):
        return "adapters"
    if parameter in embeddings:
        return "embeddings"
    if parameter in head:
        return "head"
    if PROJECTOR.search(name) and parameter not in decoder:
        return "projector"
    if parameter in vision:
        return "vision_encoder"
    if parameter in decoder:
        return "body"
    raise ConfigError(
        f"parameter {name} is neither vision encoder, projector, body, embeddings nor head: "
        "the architecture is not supported"
    )
