"""`python -m edgetune.runtime.cli` is `edgetune-rt`."""

from edgetune.runtime.cli.main import main

main()
