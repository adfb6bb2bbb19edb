"""Work of kernels and training steps, and the time that data sheets allow for it."""
