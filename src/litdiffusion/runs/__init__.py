"""The run folder: its layout, what it remembers of its making, its checkpoints, and how it is continued."""
