"""`python -m cli`, and what `torchrun -m cli` starts."""

from cli.entry import main

main()
