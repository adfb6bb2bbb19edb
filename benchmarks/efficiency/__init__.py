"""The papers' efficiency claims, and the costs of adaptive and fixed ratios, counted exactly."""
