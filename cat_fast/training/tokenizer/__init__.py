"""Training of the tokenizer, and plans of its cost and memory."""
