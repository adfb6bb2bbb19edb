"""Causality of the Q-Former under both attention implementations, and its absence in the reverse one."""

import pytest
import torch
from transformers import Blip2QFormerConfig

from cat_fast.dual_token.semantic.causal_qformer import CausalQFormer
from cat_fast.dual_token.semantic.reverse_qformer import ReverseQFormer

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 12,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make(implementation, num_queries=6):
    torch.manual_seed(0)
    config = Blip2QFormerConfig(**SMALL)
    config._attn_implementation = implementation
    model = CausalQFormer(config, num_queries).eval()
    for parameter in model.parameters():  # far from the small initial weights, so that leaks are visible
        parameter.data = torch.randn_like(parameter) * 0.5
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("i", range(6))
def test_embedding_i_ignores_later_queries(implementation, i):
    model, features = make(implementation), torch.randn(2, 5, 12)
    before = model(features)
    with torch.no_grad():
        model.query_tokens[:, i + 1 :] += torch.randn_like(model.query_tokens[:, i + 1 :]) * 3
    after = model(features)
    torch.testing.assert_close(after[:, : i + 1], before[:, : i + 1], rtol=1e-5, atol=1e-5)
    if i < 5:
        assert (after[:, i + 1 :] - before[:, i + 1 :]).abs().amax() > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_flow_from_earlier_queries_and_the_image_only(implementation):
    model, features = make(implementation), torch.randn(1, 5, 12, requires_grad=True)
    model(features)[0, 3].square().sum().backward()
    reached = model.query_tokens.grad[0].abs().sum(1) > 0
    assert reached.tolist() == [True] * 4 + [False] * 2
    assert (features.grad[0].abs().sum(1) > 0).all()


def test_implementations_agree():
    features = torch.randn(2, 5, 12)
    torch.testing.assert_close(make("sdpa")(features), make("eager")(features), rtol=1e-4, atol=1e-4)


def test_without_the_mask_later_queries_leak():
    """The mask is needed: transformers' model alone is bidirectional."""
    model, features = make("sdpa"), torch.randn(1, 5, 12)
    queries = model.query_tokens.detach().clone().requires_grad_()
    hidden = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    hidden[0, 0].square().sum().backward()
    assert (queries.grad[0].abs().sum(1) > 0).all()


def test_the_reverse_direction_sees_all_codes():
    torch.manual_seed(0)
    model = ReverseQFormer(Blip2QFormerConfig(**SMALL), 7, 10, variable_length=True).eval()
    embeddings = torch.randn(1, 4, 12, requires_grad=True)
    states, lengths = model(embeddings)
    assert states.shape == (1, 7, 10)
    assert lengths.shape == (1, 7)
    states[0, 0].square().sum().backward()
    assert (embeddings.grad[0].abs().sum(1) > 0).all()


def test_states_depend_on_the_length_and_end_with_it():
    torch.manual_seed(0)
    model = ReverseQFormer(Blip2QFormerConfig(**SMALL), 7, 10, variable_length=True).eval()
    embeddings = torch.randn(3, 4, 12)
    predicted, logits = model(embeddings)
    lengths = logits.argmax(1) + 1
    for i, length in enumerate(lengths.tolist()):
        given, _ = model(embeddings[i : i + 1], lengths[i : i + 1])
        torch.testing.assert_close(given[0, :length], predicted[i, :length])
    short, _ = model(embeddings, torch.tensor([3, 3, 3]))
    longer, _ = model(embeddings, torch.tensor([5, 5, 5]))
    assert not torch.allclose(short[:, :3], longer[:, :3])
    with torch.no_grad():  # queries behind the end change nothing
        model.query_tokens[:, 3:] += 1.0
    again, _ = model(embeddings, torch.tensor([3, 3, 3]))
    torch.testing.assert_close(again[:, :3], short[:, :3])
