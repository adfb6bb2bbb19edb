"""Language models that score by the rubric: with transformers, over an endpoint, or with llama.cpp."""
