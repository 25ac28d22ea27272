"""Parameters and FLOPs: closed forms beside the jaxpr and XLA, and the solver from a target size to a shape."""
