"""Training of the tokenizer, and predictions of its cost and memory."""
