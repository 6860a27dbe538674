"""Other people's code, run beside ours: the yardsticks of the benchmarks."""
