"""`python -m tidaldecode`."""

from tidaldecode.cli import main

main()
