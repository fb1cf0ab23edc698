"""Starts a training or evaluation module in as many processes as asked for: `python -m tools.launch MODULE ...`."""

from common.launch import main

if __name__ == "__main__":
    main()
