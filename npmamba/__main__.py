"""``python -m npmamba`` is the ``npmamba`` command."""

from npmamba.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
