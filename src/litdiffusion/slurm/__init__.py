"""What a Slurm cluster needs: its tasks as the processes of a run, and the jobs of a sweep as one array."""
