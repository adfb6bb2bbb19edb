"""Streams of training images: shards assigned to ranks, shuffled in buffers, decoded in worker processes.

    ShardSet --ShardAssignment--> a rank's shards --RatioReader--> shuffled samples of one ratio
             --PlanCursor: ratio and batch size of each step--> WorkerPool --> ImageBatch

`StreamSource` (`source.py`) connects these parts. It guarantees:

- **Epochs.** Each epoch visits the shards in a new order, a permutation seeded by (seed, epoch), and assigns
  them to ranks round-robin. With fewer shards than ranks, every rank reads all shards and takes every
  world-size-th sample. Each image is used exactly once per epoch over all ranks.
- **Epochs are counted per ratio and rank.** A ratio that is drawn more often than it occurs in the data
  starts its next epoch earlier. So does a rank with fewer images: ranks do not wait for each other.
- **Determinism.** The samples of a ratio on a rank depend on (shards, seed, rank, number of ranks) only.
  Number of workers, cache size, timing and other ratios have no influence. Crops and flips depend on (seed,
  epoch, ratio, key).
- **Resuming.** The position is five numbers per ratio; a resumed run gets the same batches as an
  uninterrupted one. On another number of ranks, `ShardAssignment.reassign` distributes the rest of the
  current epoch.
- **Errors.** Samples that cannot be read, rated or decoded are logged, counted and skipped, identically in
  each run.
"""
