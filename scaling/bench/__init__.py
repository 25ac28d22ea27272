"""What `recscale bench` measures: one benchmark a file, whose `measure_...` returns JSON-able figures."""
