"""The loop every run shares, what it is made of, and one package per model: tokenizer/ and generator/."""
