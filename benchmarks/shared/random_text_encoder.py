"""Text encoders with random weights, for tests and rates; their states mean nothing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_random_encoder(
    folder: Path,
    words: Sequence[str],
    *,
    width: int,
    layers: int = 1,
    heads: int = 2,
    hidden: int = 16,
    max_tokens: int = 16,
    seed: int = 0,
) -> str:
    """Write a BERT and a tokenizer with a token per word; return the folder.

    Args:
        words: vocabulary; other words share one token.
        width: of the states.
        hidden: width of the feed-forward layers.
        max_tokens: maximum length of a text.
    """
    vocabulary = [*SPECIAL, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=max_tokens
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)
