"""The arguments of `peft-steer tasks`."""

import argparse

from .arguments import folder, json_object


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-steer tasks",
        description="Lists the tasks that ship, or shows one of them with a document of its data.",
    )
    add = parser.add_argument
    add("name", nargs="?", help="a task; without it all are listed")
    add("--include_path", type=folder, metavar="DIR", help="folder with more tasks, as lm-eval's")
    add("--metadata", type=json_object, help="""the data's parameters, as lm-eval's: '{"data_dir": "DIR"}'""")
    return parser
