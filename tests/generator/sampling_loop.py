"""The stages of sampling in a loop: all images start together and end together."""

from cat_fast.generator.sampling import NOT_FILLED, denoise_step, guidance_scales, prepare, scheduler_step
from cat_fast.generator.solvers import set_steps


def sample(
    model,
    requests,
    schedule,
    *,
    sampler="ddpm",
    steps=250,
    guidance=1.5,
    filling=NOT_FILLED,
    forward=None,
    **options,
):
    """Return the latents (c, h, w) of requests; other `options` are those of `prepare`."""
    scheduler = set_steps(schedule, sampler, steps)
    scales = guidance_scales(guidance, [request.ratio for request in requests])
    states = [
        prepare(model, request, scheduler, guidance=scale, **options)
        for request, scale in zip(requests, scales, strict=True)
    ]
    while not states[0].finished:
        predictions = denoise_step(model, states, filling=filling, forward=forward)
        for state, prediction in zip(states, predictions, strict=True):
            scheduler_step(state, prediction)
    return [state.latent(model.config.patch_size) for state in states]
