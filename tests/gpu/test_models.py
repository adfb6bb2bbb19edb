"""Models on a GPU, at toy sizes on a CPU: autocast, compilation, sampling, encoding and decoding."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from benchmarks.gpu.operators import mixes
from benchmarks.gpu.workloads import dit, packed_batch
from cat_fast.generator.captured_step import CapturedStep, CudaGraph
from cat_fast.generator.diffusion import diffusion_loss, make_schedule
from cat_fast.generator.sampling import denoise_step
from cat_fast.inference.encoding.codec import _start_decoding
from cat_fast.inference.encoding.ratio_batches import encode_batch
from cat_fast.training.runtime.engine import in_precision
from tests.cli.conftest import tiny_tokenizer
from tests.generator.test_captured_step import BUCKETS, OnBuffers, states
from tests.generator.test_host_device import on_device
from tests.gpu.conftest import no_synchronization
from tests.inference.engine.mixes import tiny_pipeline

SAMPLING = {"num_inference_steps": 3, "scheduler": "ddim"}


def loss_and_gradients(model, batch, schedule, precision):
    """Return the loss and the gradients of a step; meta tensors have neither generators nor autocast."""
    device = batch.device
    forward = in_precision(model, precision, device) if precision == "bf16" else model
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    loss = diffusion_loss(forward, batch, None, schedule, generator=generator).loss
    return loss.detach(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_autocast_is_close_to_fp32(device):
    model, schedule = dit(device, large=device.type == "cuda"), make_schedule()
    batch = packed_batch(model, [4, 16, 64], device)
    results = [loss_and_gradients(model, batch, schedule, precision) for precision in ("fp32", "bf16")]
    assert_close(results[1][0], results[0][0], rtol=2e-2, atol=0)
    exact, ours = (torch.cat([g.flatten() for g in gradients]) for _, gradients in results)
    assert torch.nn.functional.cosine_similarity(exact, ours, dim=0) > 0.99
    assert all(torch.isfinite(g).all() for _, gradients in results for g in gradients)


def test_a_training_step_does_not_wait_for_the_device(device):
    """Without a GPU, meta tensors stand for those of one, in fp32."""
    on_gpu = device.type == "cuda"
    device = device if on_gpu else torch.device("meta")
    model = dit(device, large=on_gpu)
    batch = packed_batch(model, [4, 16, 64], device) if on_gpu else on_device(device)[0]
    arguments = model, batch, make_schedule(), "bf16" if on_gpu else "fp32"
    loss_and_gradients(*arguments)  # compiles, and moves the schedule's table once
    with no_synchronization(device):
        loss, _ = loss_and_gradients(*arguments)
    assert loss.device == device
    if on_gpu:
        assert torch.isfinite(loss)


def test_the_compiled_model_is_close_and_compiles_each_kind_of_block_once(device):
    """Compile as training does; batches of one sequence need graphs of their own."""
    on_gpu = device.type == "cuda"
    torch._dynamo.reset()
    model, eager = (dit(device, large=on_gpu).eval() for _ in range(2))
    counter = CompileCounterWithBackend("inductor" if on_gpu else "eager")
    model.compile_repeated_blocks(backend=counter, dynamic=True)
    drawn = mixes(50, longest=256) if on_gpu else mixes(10, longest=24)
    for lengths in ([2, 3, 4], *(mix for mix in drawn if len(mix) > 1)):
        batch = packed_batch(model, [max(length, 2) for length in lengths], device)
        timesteps = torch.zeros(len(lengths), dtype=torch.int64, device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            got, want = (each(batch, timesteps, return_dict=False)[0] for each in (model, eager))
        assert_close(got, want, rtol=0, atol=3e-2 * want.abs().max().item())
    assert counter.frame_count == 2  # the first block has no pending branch, all others do
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_gives_the_images_of_the_cpu(device, dtype):
    """Noise comes from a counter, so that a GPU draws the images of a CPU."""
    images = {}
    for place, number in (("cpu", torch.float32), (device, dtype)):
        pipeline = tiny_pipeline().to(place, number)
        images[str(place)] = pipeline([0, 1, 2], ratio=8, output_type="pt", **SAMPLING).images.float().cpu()
    want, got = images["cpu"], images.get(str(device), images["cpu"])
    assert torch.isfinite(got).all()
    assert (got - want).square().mean().sqrt() < (2e-2 if dtype == torch.float32 else 0.1)


def test_captured_steps_give_the_predictions_of_eager_ones(device):
    model = dit(device, large=device.type == "cuda").eval()
    forward = CapturedStep(model, CudaGraph if device.type == "cuda" else OnBuffers)
    for seed in range(4):
        step = states(model, seed)
        eager = denoise_step(model, step, filling=BUCKETS)
        captured = denoise_step(model, step, filling=BUCKETS, forward=forward)
        assert all(map(torch.equal, captured, eager))
    assert forward.report.failure is None
    assert forward.report.replayed > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_encoding_and_decoding_are_close_to_fp32_on_a_cpu(device, dtype, ratio):
    tokenizer = tiny_tokenizer()
    pixels = list(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    latents = torch.stack(encode_batch(tokenizer, pixels, ratio))
    images = _start_decoding(tokenizer, list(latents), ratio)
    module = tiny_tokenizer().to(device, dtype).to(memory_format=torch.channels_last)
    tolerance = 2e-2 if dtype == torch.float32 else 5e-2
    got = torch.stack(encode_batch(module, pixels, ratio))
    assert (got - latents).square().mean().sqrt() < tolerance * latents.square().mean().sqrt()
    decoded = _start_decoding(module, list(latents), ratio).cpu()
    assert (decoded - images).square().mean().sqrt() < tolerance * images.square().mean().sqrt()
