"""The command `karmma`, and `python -m karmma`: until the commands are loaded, Ctrl-C has nothing to keep."""

import sys


def main() -> None:
    """Load the commands and run one."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("Interrupted before anything was done.", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
