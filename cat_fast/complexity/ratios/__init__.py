"""Choice of compression ratios: thresholds, mixes and their cost, budgets, rules for labelled images."""
