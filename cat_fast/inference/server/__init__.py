"""HTTP server of a pipeline: OpenAI's images API, reconstructions, complexity, and a page to try them."""
