"""Fused operators, installed as `cat_fast.kernels`: one folder an operator, imported by its full name."""
