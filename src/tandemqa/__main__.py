"""`python -m tandemqa`, the same as `tandemqa`."""

from tandemqa.cli import main

main()
