"""GroupNorm followed by SiLU in one operator; models call `op`, `reference` is the formula."""
