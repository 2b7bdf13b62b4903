"""What the next steps will do: a function-space model of the run's own optimizer, its stability, its verdicts."""
