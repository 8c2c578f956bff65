"""`python -m rsm_guidance` is the command line."""

from rsm_guidance.cli.main import main

main()
