"""GPU kernels compiled without a GPU, and held to budgets."""
