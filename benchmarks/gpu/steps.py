"""Training steps of the paper's models: time, MFU, memory, synchronizations, and the profiler's table."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks.bounds.kernels import MIX
from benchmarks.gpu.blocks import VAE_STEPS
from benchmarks.gpu.body import Context
from benchmarks.gpu.record import read_entries
from benchmarks.gpu.sampling import count_launches, sampling_steps
from benchmarks.gpu.workloads import dit, packed_batch
from benchmarks.shared.configs import tokenizer_run
from cat_fast.generator.diffusion import diffusion_loss, make_schedule
from cat_fast.generator.flops import META, SequenceFlops
from cat_fast.hardware import gpu_in_use, run_device_type
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.engine import in_precision

ROWS = 25
"""Lines of the profiler's table."""
VAE_IMAGES = 8
TOY = [
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.latent_channels=4",
    "model.layers_per_block=1",
    "model.mid_block_num_layers=1",
    "data.image_size=64",
    "loss.features_weight=0",
    "loss.perceptual_weight=0",
    "discriminator.pretrained=",
    "discriminator.resolution=64",
    "discriminator.channel_base=128",
    "discriminator.channel_max=16",
]


class DiTStep:
    """A training step of cat_xl on 16,384 tokens in bf16, with fused AdamW."""

    def __init__(self, device: torch.device, *, large: bool, compiled: bool) -> None:
        self.device, self.lengths = device, MIX if large else [16, 4]
        self.model = dit(device, large=large)
        if compiled:
            self.model.compile_repeated_blocks(dynamic=True)
        self.batch = packed_batch(self.model, self.lengths, device)
        self.schedule = make_schedule()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def __call__(self) -> None:
        forward: Any = in_precision(self.model, "bf16", self.device)
        diffusion_loss(forward, self.batch, None, self.schedule).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self) -> int:
        """Return the executed FLOPs of a step, forward and backward."""
        config = {key: value for key, value in self.model.config.items() if not key.startswith("_")}
        with META:
            counted = SequenceFlops(type(self.model)(**config), training=True)
        return sum(counted.of(length) for length in self.lengths)


def compile(context: Context) -> None:  # the block's name
    """Compile the step of cat_xl, so that the block `steps` finds it in the compiler's cache."""
    if context.dry:
        context.record.skipped("seconds", "a dry run does not compile")
        DiTStep(torch.device("cpu"), large=False, compiled=False)()
        return
    started = time.monotonic()
    DiTStep(torch.device("cuda"), large=True, compiled=True)()
    torch.cuda.synchronize()
    context.record.figure("seconds", time.monotonic() - started, "s")


def steps(context: Context) -> None:
    """Record the steps of the transformer and of the tokenizer."""
    device = torch.device(run_device_type())
    ceilings = {
        entry["name"]: entry["value"]
        for entry in read_entries(context.record.path)
        if entry["block"] == "ceilings" and entry["kind"] == "figure"
    }
    eager = DiTStep(device, large=not context.dry, compiled=False)
    flops = eager.flops()
    _time_dit(context, "cat_xl_eager", eager, flops, ceilings)
    _profile(context, eager)
    del eager
    _free()
    sampling_steps(context, device)
    _free()
    if context.dry:
        for what in ("milliseconds", "mfu", "of_matmul", "peak_bytes"):
            context.record.skipped(f"cat_xl_compiled.{what}", "a dry run does not compile")
    else:
        compiled = DiTStep(device, large=True, compiled=True)
        _time_dit(context, "cat_xl_compiled", compiled, flops, ceilings)
        del compiled
        _free()
    _vae_steps(context, device)


def _time_dit(context: Context, name: str, step: DiTStep, flops: int, ceilings: dict[str, float]) -> None:
    seconds, peak = _time(step, step.device)
    record, gpu = context.record, gpu_in_use()
    record.figure(
        f"{name}.milliseconds",
        1e3 * seconds,
        "ms",
        flops=flops,
        tokens=sum(step.lengths),
        images=len(step.lengths),
        parameters=sum(p.numel() for p in step.model.parameters()),
    )
    record.figure(f"{name}.peak_bytes", peak, "B")
    if gpu is None:
        record.skipped(f"{name}.mfu", "the data sheet of this device is not known")
    else:
        record.figure(f"{name}.mfu", flops / seconds / gpu.flops_per_second("bfloat16"), "ratio")
    if ceilings.get("matmul_bfloat16"):
        record.figure(f"{name}.of_matmul", flops / seconds / ceilings["matmul_bfloat16"], "ratio")
    else:
        record.skipped(f"{name}.of_matmul", "the block ceilings has no figure")


def _time(step: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Return the median seconds of a step and its peak memory in bytes; 0 on a CPU."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 1):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10 if cuda else 2):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times), torch.cuda.max_memory_allocated() if cuda else 0


def _profile(context: Context, step: DiTStep) -> None:
    """Record synchronizations and launches of a step; print the profiler's table and write its trace."""
    cuda = step.device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    context.record.figure("cat_xl_eager.synchronizations", len(waits), "per step", messages=waits[:10])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    context.record.figure("cat_xl_eager.launches", count_launches(profiler), "per step")
    print(averages.table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=ROWS))
    profiler.export_chrome_trace(str(context.work / "trace.json"))


def _vae_steps(context: Context, device: torch.device) -> None:
    try:
        from cat_fast.training.tokenizer.synthetic_step import Workload
    except ImportError as error:
        for name in VAE_STEPS:
            for what in ("milliseconds", "peak_bytes"):
                context.record.skipped(f"{name}.{what}", str(error))
        return
    config = tokenizer_run("cat_c16", TOY if context.dry else ["discriminator.pretrained="])
    images = 2 if context.dry else VAE_IMAGES
    failed: list[str] = []
    for name in VAE_STEPS:
        try:
            if context.left < 6:
                raise TimeoutError("no time was left")
            ratio, precision = int(name.split("_")[1][:-1]), name.split("_")[2]
            workload = Workload(replace(config, precision=precision), device)
            seconds, peak = _time(partial(workload.step, workload.batch(ratio, images)), device)
            trained = sum(p.numel() for parameters in workload.trained.values() for p in parameters)
            context.record.figure(
                f"{name}.milliseconds", 1e3 * seconds, "ms", images=images, parameters=trained
            )
            context.record.figure(f"{name}.peak_bytes", peak, "B")
            del workload
        except Exception as error:  # one step must not cost the others
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
            for what in ("milliseconds", "peak_bytes"):
                context.record.skipped(f"{name}.{what}", f"{type(error).__name__}: {error}"[:300])
        _free()
    for ratio in (8, 16):
        if context.left < 30 and not context.dry:
            context.record.skipped(f"vae_{ratio}x_predicted_bytes", "no time was left")
        else:
            context.record.figure(f"vae_{ratio}x_predicted_bytes", _predicted(config, ratio, images), "B")
    if failed:
        raise RuntimeError("; ".join(failed))


def _predicted(config: TokenizerRun, ratio: int, images: int) -> int:
    """Return the peak memory of a step in fp32 as `cat-fast plan memory` predicts it, without ZeRO."""
    from cat_fast.training.tokenizer.predict_memory import trace
    from cat_fast.training.tokenizer.synthetic_step import Workload

    with FakeTensorMode():
        workload = Workload(replace(config, precision="fp32"), "cpu")
        trained = sum(p.numel() for parameters in workload.trained.values() for p in parameters)
        frozen = sum(tensor.nbytes for tensor in workload.frozen)
        return 12 * trained + frozen + max(trace(workload, ratio, images))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
