"""Parts of `benchmarks/train_step.py`: what is measured, how, and against what."""
