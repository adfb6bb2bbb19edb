"""Linear layers on a choice of libraries for their fp32 products on CPUs; models use `layer`."""
