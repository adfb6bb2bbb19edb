"""Model of training on many GPUs: computing, waiting, communication, loading, failures and cost."""
