"""What touches the operating system: files, processes, start-up, and the secrets of the environment."""
