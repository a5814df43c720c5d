"""The command line, and the checkpoint files of any size that it reads and prunes piece by piece."""
