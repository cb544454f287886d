"""``python -m mindpeft``."""

from mindpeft.cli.main import main

main()
