"""What `recscale bench` measures: one benchmark a file, each with a `run(...)` that returns JSON-able figures."""
