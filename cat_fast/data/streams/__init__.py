"""Images from sets of any size: dealt to ranks shard by shard, shuffled in buffers, decoded in workers.

    shard set --Dealing--> a rank's shards --RatioReader--> shuffled runs of one ratio --workers--> batches

`StreamSource` puts it together. What it promises:

- **Epochs.** The set is cut into shards. In every epoch they come in a new order, a permutation seeded by
  (seed, epoch), and are dealt to the ranks in turn. Where there are fewer shards than ranks, every rank reads
  all of them and takes every world-size-th sample. So each image comes up exactly once an epoch over all
  ranks. Each ratio counts its own epochs: a ratio that is drawn more often than the data hold it begins its
  next epoch sooner. So does a rank whose part is smaller: ranks do not wait for each other, and may be in
  different epochs.
- **Order.** What a rank sees of a ratio is a function of (shards, seed, rank, number of ranks) alone: not of
  the number of workers, the size of the cache, timing, or what other ratios were drawn. Crops and flips are a
  function of (seed, epoch, ratio, image).
- **Position.** It is five numbers a ratio, so a resumed run sees the very batches of a straight one. On
  another number of ranks, `Dealing.resumed` says what is left of the epoch under way.
- **Damage.** What cannot be read, rated or decoded is logged, counted and passed over, on every run alike.
"""
