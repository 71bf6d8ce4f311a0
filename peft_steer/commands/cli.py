"""`python -m peft_steer.commands.cli`, for where the console command `peft-steer` is not on the path."""

import sys

from peft_steer_cli import main


if __name__ == "__main__":
    sys.exit(main())
