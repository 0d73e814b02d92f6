"""Stage 1: from public dataset files and images to a feature cache.

`sources` says which images and expressions are meant, `pipeline` computes their features shard by shard,
`annotations` writes their tables, `run` puts these together, and `estimate` says beforehand what it takes.
"""
