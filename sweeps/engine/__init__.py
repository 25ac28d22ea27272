"""From a sweep file to finished runs: combinators, the plan, workers, locks and tables."""
