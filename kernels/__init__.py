"""Fused operators, installed as `cat_fast.kernels`: one folder per operator, imported by its full name."""
