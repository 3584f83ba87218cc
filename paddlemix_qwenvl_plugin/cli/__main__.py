"""`python -m paddlemix_qwenvl_plugin.cli`, the same as `qwenvl`."""

from paddlemix_qwenvl_plugin.cli.main import main

main()
