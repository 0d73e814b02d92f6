"""`python -m cli`, and what `torchrun -m cli` starts."""

from cli.app import main

main()
