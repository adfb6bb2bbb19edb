"""GroupNorm followed by SiLU in one operator: `op` is what models call, `reference` the formula."""
