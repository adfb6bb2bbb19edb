"""The sentence encoder against transformers' model of the same weights."""

import torch
from transformers import BertModel

from cat_fast.complexity.sentence_encoder import MAX_TOKENS, SentenceEncoder, find_encoder


def test_layers_equal_those_of_transformers():
    encoder = SentenceEncoder.load()
    model = BertModel.from_pretrained(find_encoder(), add_pooling_layer=False).eval()
    tokens = encoder.tokens(["a dog on the grass", "Two kids walking on a beach, 2019 ✓", "word " * 400])
    assert [len(ids) for ids in tokens][2] == MAX_TOKENS
    ids = torch.zeros(3, MAX_TOKENS, dtype=torch.int64)
    real = torch.zeros(3, MAX_TOKENS, dtype=torch.bool)
    for row, own in enumerate(tokens):
        ids[row, : len(own)] = torch.tensor(own)
        real[row, : len(own)] = True
    with torch.no_grad():
        expected = model(ids, real.long(), output_hidden_states=True).hidden_states
        states = encoder.embed(ids)
        for layer, hidden in zip((None, *encoder.layers), expected, strict=True):
            states = states if layer is None else layer(states, real)
            assert torch.allclose(states[real], hidden[real], atol=1e-5)
