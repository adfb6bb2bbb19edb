"""Training: the loop shared by all runs, and one package per model, `tokenizer/` and `generator/`.

One step from top to bottom; every rank runs all of it:

    deepspeed --module cat_fast.train   start one process per GPU (`launch.launch` does so from Python)
    cat_fast.train.train                load the configuration, `runtime.ranks.start`, `tasks.make_task`
    loop.run                            lock the folder, load the newest checkpoint, iterate over steps
      rehearsal.rehearse                before the first step, try out what first happens at a late one
      step.Stepper.step                 one step of any task
        task.draw                       read this rank's batches; return its images, tokens, seconds
        metrics.step_means.reduce_step  reduction 1: amounts of all ranks, stop requests, failed draws
        task.backward                   forward and backward passes of every accumulation step
        StepGuard.inspect               non-finite losses and gradient norms of this rank
        _DeferredLog.flush              log the previous step while the device computes
        reduce_step                     reduction 2: finiteness, sums of metrics, busy times, requests
        StepGuard.passes                skip the update on all ranks if anything is not finite
        task.update                     `engine.step()`, then `runtime.ema.EMA.update`
      _DeferredLog.add                  keep the metrics for the next flush
      CheckpointStore.save              every `checkpoint.every_steps` steps, on a stop and at the end
      _DeferredLog.show                 on rank 0, draw a grid and evaluate, if they are due
      _export                           after the last step: write `model/` for `from_pretrained`
"""
