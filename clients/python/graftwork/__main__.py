"""python -m graftwork: the command line without the script."""

from graftwork.cli import main

main()
