"""Tiny vision-language models of the real classes, saved to disk with real processors.

Every known word is a direction of its own, and the output layer maps the last word to the next one, so that a
model can be made to reply in a given form. Without `following` all weights are random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BlipImageProcessor,
    CLIPImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

HIDDEN = 64
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_PLACE = {"llava": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
KINDS = ("llava", "instructblip", "qwen2_vl")


def save_model(
    folder: Path, kind: str, following: Mapping[str, str] | None = None, *, chat: bool = True
) -> Path:
    """Save a model that replies with `following`, the next word per word, or a random one.

    A word without a next one is followed by the end.
    """
    random = {f"word{i}": f"word{i}" for i in range(HIDDEN - len(SPECIAL) - len(QWEN))}
    words = sorted({word for pair in (following or random).items() for word in pair} - set(SPECIAL))
    tokenizer = _tokenizer([*SPECIAL, *QWEN], words)
    size = len(tokenizer)
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "instructblip": _instructblip, "qwen2_vl": _qwen}[kind](
        tokenizer, size
    )
    with torch.no_grad():
        for parameter in model.parameters():  # InstructBLIP's own initialization is almost zero
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if following is None else 0.002)
    if following is not None:
        language = model.language_model if kind == "instructblip" else model
        vocabulary = tokenizer.get_vocab()
        with torch.no_grad():
            language.get_input_embeddings().weight.copy_(torch.eye(size, HIDDEN))
            table = torch.zeros(size, HIDDEN)
            for word in [*words, "<unk>"]:
                table[vocabulary[following.get(word, "</s>")], vocabulary[word]] = 5
            language.get_output_embeddings().weight.copy_(table)
    model.generation_config.do_sample = True  # published ones have such settings; captions ignore them
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(folder)
    if not chat:
        processor.chat_template = None
    processor.save_pretrained(folder)
    return folder


def _tokenizer(special: list[str], words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    assert len(vocabulary) <= HIDDEN
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[4:],
        model_input_names=["input_ids", "attention_mask"],
    )


def _template(kind: str) -> str:
    return (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        + _PLACE[kind]
        + "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )


def _text(size: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": size,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }


def _llava(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Any, Any]:
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_vision()},
        text_config=LlamaConfig(**_text(size, tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("llava"),
    )
    return LlavaForConditionalGeneration(config), processor


def _instructblip(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Any, Any]:
    queries = 3
    former = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = InstructBlipConfig(
        vision_config=_vision(),
        qformer_config={**former, "num_attention_heads": 2, "encoder_hidden_size": 32},
        text_config=LlamaConfig(**_text(size, tokenizer)).to_dict(),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    processor = InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=queries)
    return InstructBlipForConditionalGeneration(config), processor


def _qwen(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Any, Any]:
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": HIDDEN},
        text_config={
            **_text(size, tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    processor = Qwen2VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=_template("qwen2_vl")
    )
    return Qwen2VLForConditionalGeneration(config), processor
