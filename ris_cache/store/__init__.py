"""The cache format: what lies in a cache directory, and how it is written and read."""
