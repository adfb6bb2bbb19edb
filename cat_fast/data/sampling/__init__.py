"""The ratio and the images of each rank in each step, and the costs by which steps are balanced."""
