"""What `python -m wda` runs, as torchrun does."""

from wda.cli import main

if __name__ == "__main__":
    main()
