"""The layer axis: how the per-example Jacobian of each layer looks, and how it is captured."""
