"""Re-rendering: a guide and text states -> image at any size (branch III of the paper, section 3.3).

guide -> enlarge -> VAE -> unconditional inversion -> conditional denoising -> VAE -> image

trajectory          noise levels, and the steps between them in both directions
backend             interface of diffusion models
stable_diffusion    a Stable Diffusion folder of diffusers
cat_pipeline        a text-conditional pipeline of this package
rerender            the method, its options and its ablations
"""
