"""Files: sparse models, checkpoints of other programs, and the file that a run resumes from."""
