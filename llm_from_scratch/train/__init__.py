"""Training: losses, optimisers, the loop, and one small file per method."""
