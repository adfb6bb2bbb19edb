"""Gradient penalties, forward mode and per-sample gradients through the models, on forced backends."""

import copy

import pytest
import torch
from torch.func import functional_call

from cat_fast import NestedAutoencoderKL
from cat_fast.generator import DiT, PackedText
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator

GRIDS = [(4, 4), (2, 3)]


class DiTCase:
    """Loss of a small DiT; its inputs are the latents of two images."""

    operators = ("pack", "adaln", "gate_residual_adaln", "varlen_attention")

    def __init__(self, **options):
        self.options = options

    def model(self):
        model = DiT(
            in_channels=2,
            hidden_size=64,
            depth=2,
            num_heads=2,
            num_classes=10,
            position_frame=4,
            **self.options,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # a fresh model predicts zero
                    parameter.normal_(std=0.1)
        return model.eval()

    def inputs(self):
        return tuple(torch.randn(2, 2 * h, 2 * w) for h, w in GRIDS)

    def loss(self, model, *latents):
        packed = PackedSequence.from_latents(latents, (8, 16))
        texts = PackedText.of([x.flatten()[:8].view(1, 8) for x in latents])
        labels, timesteps = torch.tensor([1, 9]), torch.tensor([10, 900])
        predicted = model(packed, timesteps, labels, texts if model.config.text_dim else None).sample
        return predicted.pow(3).mean() + predicted.square().mean()


class CheckpointedDiTCase(DiTCase):
    def model(self):
        model = super().model()
        model.enable_gradient_checkpointing()
        return model


class VAECase:
    """Loss of a small nested VAE; its input is an image."""

    operators = ("group_norm_silu", "scalar_attention")

    def __init__(self, head_dim):
        self.head_dim = head_dim

    def model(self):
        return NestedAutoencoderKL(
            block_out_channels=(4, 4, 4, 8, 8, 8),
            latent_channels=4,
            norm_num_groups=2,
            mid_block_num_layers=1,
            mid_block_attention_head_dim=self.head_dim,
            layers_per_block=1,
        )

    def inputs(self):
        return (torch.randn(1, 3, 32, 32),)

    def loss(self, model, x):
        reconstruction = model.decode(model.encode(x, 8).latent_dist.mode(), 8).sample
        return reconstruction.pow(3).mean() + (reconstruction - x).square().mean()


class DiscriminatorCase:
    operators = ()

    def model(self):
        return StyleGANDiscriminator(resolution=16, channel_base=64, channel_max=8)

    def inputs(self):
        return (torch.randn(2, 3, 16, 16),)

    def loss(self, model, x):
        return model(x).pow(3).mean()


EXTENSIONS = {"text_dim": 8, "rope": True, "qk_norm": True, "swiglu": True, "shared_adaln": True}
CASES = {
    "dit": DiTCase(),
    "checkpointed_dit": CheckpointedDiTCase(),
    "extended_dit": DiTCase(**EXTENSIONS),
    "vae": VAECase(head_dim=1),
    "vae_with_heads_of_4": VAECase(head_dim=4),  # on torch's attention
    "discriminator": DiscriminatorCase(),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


@pytest.fixture(params=["reference", "cpp"])
def forced(request, case, monkeypatch):
    from cat_fast.kernels import backends

    for row in backends.report():
        if row.backend == request.param and row.op in case.operators and row.status != "active":
            pytest.skip(f"{row.op} {request.param}: {row.status}")
    names = ",".join(f"{operator}={request.param}" for operator in case.operators)
    monkeypatch.setenv("CAT_FAST_BACKEND", names)


def double(case, model, inputs):
    """Return copies of the model and its inputs in float64, which run on the reference."""
    return copy.deepcopy(model).double(), [x.double() for x in inputs]


def penalty(case, model, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(case.loss(model, *inputs), inputs, create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)


def central_difference(function, model, directions, step=1e-5):
    """Return the derivative of function() in `directions`, one per parameter of the model."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter += sign * step * direction
        values.append(function().item())
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter -= sign * step * direction
    return (values[0] - values[1]) / (2 * step)


def test_gradient_penalty_matches_finite_differences(case, forced, monkeypatch):
    model, inputs = case.model(), case.inputs()
    directions = [torch.randn_like(parameter) for parameter in model.parameters()]
    gradients = torch.autograd.grad(
        penalty(case, model, inputs), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    got = sum((g.double() * d.double()).sum().item() for g, d in zip(gradients, directions, strict=True))
    monkeypatch.delenv("CAT_FAST_BACKEND")
    model, inputs = double(case, model, inputs)
    expected = central_difference(lambda: penalty(case, model, inputs), model, directions)
    assert abs(expected) > 1e-6
    assert got == pytest.approx(expected, rel=1e-3)


def test_forward_mode_matches_reverse_mode(case, forced):
    model, inputs = case.model(), case.inputs()
    directions = tuple(x.cos() for x in inputs)
    _, got = torch.func.jvp(lambda *x: case.loss(model, *x), inputs, directions)
    leaves = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(case.loss(model, *leaves), leaves)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert got.item() == pytest.approx(expected.item(), rel=1e-3)


def test_per_sample_gradients_match_a_loop(case, forced):
    if isinstance(case, CheckpointedDiTCase):
        pytest.skip("torch.func does not support checkpointing")
    model, batch = case.model(), [case.inputs() for _ in range(2)]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, *inputs):
        return functional_call(_Loss(model, case), {f"model.{k}": v for k, v in parameters.items()}, inputs)

    stacked = [torch.stack(samples) for samples in zip(*batch, strict=True)]
    got = torch.func.vmap(torch.func.grad(loss), (None, *(0 for _ in stacked)))(parameters, *stacked)
    for i, inputs in enumerate(batch):
        model.zero_grad()
        case.loss(model, *inputs).backward()
        largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert (got[name][i] - parameter.grad).abs().max() <= 1e-4 * largest, name


class _Loss(torch.nn.Module):
    """Wrapper for `functional_call`, which replaces the parameters of a module's forward method."""

    def __init__(self, model, case):
        super().__init__()
        self.model, self.case = model, case

    def forward(self, *inputs):
        return self.case.loss(self.model, *inputs)


def test_labels_and_timesteps_of_per_sample_gradients_may_be_batched():
    case = DiTCase()
    model = case.model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    latents, labels, timesteps = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 10]), torch.tensor([5, 50, 900])

    def loss(parameters, latent, label, timestep):
        packed = PackedSequence.from_latents([latent], [8], labels=label[None])
        predicted = functional_call(model, parameters, (packed, timestep[None])).sample
        return predicted.square().mean()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, latents, labels, timesteps)
    for i in range(3):
        one = torch.func.grad(loss)(parameters, latents[i], labels[i], timesteps[i])
        for name, gradient in one.items():
            torch.testing.assert_close(got[name][i], gradient, atol=1e-5, rtol=1e-4)
