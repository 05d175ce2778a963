"""Tokenizers of four kinds, trained on a corpus, with the chat template that belongs to each model family."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.trainers import Trainer
    from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["byte-bpe", "unigram", "metaspace-bpe"]

PRINTABLE_ASCII = [chr(code) for code in range(32, 127)] + ["\n"]
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% elif message['role'] == 'system' %}<|system|>"
    "{% else %}<|user|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Special tokens and template of one model family."""

    end_of_turn: str
    """Closes an assistant turn and ends generation."""
    pad: str
    image: str
    """The token that the processor repeats once per image embedding."""
    template: str
    bos: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    """Tokens that the processor of the family looks up as attributes of the tokenizer."""
    others: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> list[str]:
        """Every special token once, in the order of their ids."""
        tokens = [self.pad, self.end_of_turn, self.bos, self.image, *self.named.values(), *self.others]
        return list(dict.fromkeys(token for token in tokens if token is not None))


CHAT_FORMATS = {
    "qwen2-vl": ChatFormat(
        end_of_turn="<|im_end|>",
        pad="<|endoftext|>",
        image="<|image_pad|>",
        template=CHATML_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        others=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    ),
    "internvl": ChatFormat(
        end_of_turn="<|im_end|>",
        pad="<|endoftext|>",
        image="<IMG_CONTEXT>",
        template=CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        others=("<|im_start|>",),
    ),
    "llava": ChatFormat(
        end_of_turn="</s>",
        pad="<pad>",
        image="<image>",
        template=LLAVA_TEMPLATE,
        bos="<s>",
        named={"image_token": "<image>"},
        others=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "qwen2": ChatFormat(
        end_of_turn="<|im_end|>",
        pad="<|endoftext|>",
        image="<|image_pad|>",
        template=CHATML_TEMPLATE.replace("IMAGE", ""),
        others=("<|im_start|>",),
    ),
}


def train_tokenizer(
    kind: TokenizerKind, *, corpus: Iterable[str], vocab_size: int, chat: ChatFormat
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer with at most ``vocab_size`` entries, the special tokens of ``chat`` included."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, trainer = _untrained(kind, vocab_size=vocab_size, special_tokens=chat.special_tokens)
    tokenizer.train_from_iterator(_with_roles(corpus), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.bos,
        eos_token=chat.end_of_turn,
        pad_token=chat.pad,
        unk_token=None if kind == "byte-bpe" else "<unk>",
        extra_special_tokens=dict(chat.named) or list(chat.others),
        chat_template=chat.template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _with_roles(corpus: Iterable[str]) -> Iterator[str]:
    """Follow each text by the words of the chat template, so that these become tokens."""
    for text in corpus:
        yield from (text, "user\n", "assistant\n")


def _untrained(kind: TokenizerKind, *, vocab_size: int, special_tokens: list[str]) -> "tuple[Tokenizer, Trainer]":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    common: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False}
    if kind == "byte-bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(special_tokens=special_tokens, initial_alphabet=alphabet, **common)
    common |= {"special_tokens": ["<unk>", *special_tokens], "initial_alphabet": PRINTABLE_ASCII}
    trainer: Trainer
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(**common)
    lines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="never")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer, trainer
