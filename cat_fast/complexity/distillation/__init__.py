"""Distillation of scorers from rated captions: the data, folds, quality out of fold, and the fits."""
