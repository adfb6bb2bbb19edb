"""Evaluation of the dual-token tokenizer against baselines of equal size or equal bits.

super_resolution    enlarging of guides: bicubic, or a network
movq                MoVQ of as many tokens
bit_budget          JPEG and WebP of as many bits as the tokens
methods             methods that are compared, per guide size
run                 rows per image and method, resumable
summary             means, intervals and paired differences
"""
