"""`python -m cli`, the same as `ris`; what torchrun starts."""

from cli.app import main

main()
