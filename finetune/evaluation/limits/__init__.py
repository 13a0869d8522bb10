"""What generated images could reach: real images that nobody saw, repeats of trials, and models of other seeds."""
