"""`python -m certworker`: the command line, when its script is not on the PATH."""

from certworker.cli.main import main

if __name__ == "__main__":
    main()
