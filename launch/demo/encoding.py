"""Digit conversations as batches for a small vision-language model: ids, which of them to learn, images."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from launch.demo.digits import IMAGE_SHAPE, Conversation


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Conversations padded on the right."""

    token_ids: Int[Tensor, "batch tokens"]
    predicts_answer: Bool[Tensor, "batch tokens"]
    """True where the next token is one of an answer."""
    images: list[Tensor]


class ConversationEncoder:
    """Token ids of digit conversations; quick because texts repeat and every image expands alike."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        user = [{"type": "image"}, {"type": "text", "text": "@"}]
        assistant = {"role": "assistant", "content": [{"type": "text", "text": "@"}]}
        turns = [{"role": "user", "content": user}, assistant, {"role": "user", "content": user[1:]}, assistant]
        head, self.header, between, _, _ = processor.apply_chat_template(turns, tokenize=False).split("@")
        self.end_of_turn = self.tokenizer.eos_token
        self.between = between.removeprefix(self.end_of_turn)
        expanded = processor(
            text=[head],
            images=[rgb(np.zeros(IMAGE_SHAPE, dtype=np.uint8))],
            add_special_tokens=False,
            return_tensors="pt",
        )
        self.head_ids = expanded["input_ids"][0].tolist()
        self.text_ids = functools.cache(self._text_ids)

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Return the ids up to the last end of turn, and which of them predict a token of an answer."""
        ids, predicts = list(self.head_ids), [False] * len(self.head_ids)
        for number, turn in enumerate(conversation.turns):
            question = self.text_ids((self.between if number else "") + turn.question + self.header)
            answer = self.text_ids(turn.answer + self.end_of_turn)
            ids += question + answer
            predicts += [False] * (len(question) - 1) + [True] * len(answer) + [False]
        return ids, predicts

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        """Encode and pad conversations."""
        encoded = [self.encode(conversation) for conversation in conversations]
        longest = max(len(ids) for ids, _ in encoded)
        return Batch(
            token_ids=torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in encoded]),
            predicts_answer=torch.tensor([marks + [False] * (longest - len(marks)) for _, marks in encoded]),
            images=[rgb(conversation.image) for conversation in conversations],
        )


def rgb(image: UInt8[np.ndarray, "height width"]) -> UInt8[Tensor, "3 height width"]:
    """Return a grey image as the image processors take it."""
    return torch.from_numpy(image)[None].expand(3, -1, -1)


def image_features(
    model: Any, processor: Any, images: Sequence[UInt8[Tensor, "3 height width"]]
) -> Float[Tensor, "images image_tokens hidden"]:
    """Return what takes the place of the image tokens' embeddings, for images of one size."""
    inputs = processor.image_processor(list(images), return_tensors="pt")
    inputs.pop("num_patches", None)
    features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    return torch.cat(tuple(features)).view(len(images), -1, features[0].shape[-1])


def answer_rows(model: Any, encoder: ConversationEncoder, batch: Batch) -> Float[Tensor, "answers hidden"]:
    """Return the final hidden states that predict the answers' tokens.

    No padding mask is needed: padding stands behind everything that predicts.
    """
    embeddings = model.get_input_embeddings()(batch.token_ids)
    at_image = (batch.token_ids == encoder.processor.image_token_id)[..., None]
    features = image_features(model, encoder.processor, batch.images)
    embeddings = embeddings.masked_scatter(at_image, features.to(embeddings.dtype))
    positions = {}
    if hasattr(model.model, "get_rope_index"):
        longest, at_image = batch.token_ids[:1], at_image[:1, :, 0]
        grid = encoder.processor.image_processor(batch.images[:1], return_tensors="pt")["image_grid_thw"]
        index, _ = model.model.get_rope_index(longest, image_grid_thw=grid, mm_token_type_ids=at_image.int())
        positions["position_ids"] = index.expand(-1, len(batch.token_ids), -1)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False, **positions).last_hidden_state
    return hidden[batch.predicts_answer]
