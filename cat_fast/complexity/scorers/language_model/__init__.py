"""Language models that score by the rubric: by transformers, over an OpenAI-compatible endpoint, by llama.cpp."""
