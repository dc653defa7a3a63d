"""The command line. Imports of torch happen inside the commands, so that --help is fast."""

from lgcnet_fast.cli.app import app, main

__all__ = ["app", "main"]
