"""`python -m falcon_fast`, the same as `falcon-fast`."""

from falcon_fast.cli.entry import main

if __name__ == "__main__":
    main()
