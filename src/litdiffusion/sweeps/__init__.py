"""The jobs of a sweep, each a process of its own: what they are, how they run, what has come of them."""
