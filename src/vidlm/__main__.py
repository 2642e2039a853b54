"""`python -m vidlm`, the same as `vidlm`."""

from vidlm.cli import main

if __name__ == "__main__":
    main()
