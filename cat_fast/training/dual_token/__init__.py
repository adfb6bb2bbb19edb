"""Training of the dual-token tokenizer, one task per stage of the paper."""
