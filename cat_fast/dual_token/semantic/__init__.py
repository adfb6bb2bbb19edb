"""Semantic codes: image -> 32 causal discrete codes -> text states (branch II of the paper, section 3.2).

causal_qformer      image features -> 32 causal embeddings
contrastive         InfoNCE between the last embedding and the text (equation 6)
code_decoder        codes -> embeddings (equation 7)
reverse_qformer     codes -> the states of a text encoder (equation 8)
model               all of them in one folder
"""
