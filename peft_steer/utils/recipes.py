"""The recipes that ship: inside the package in a wheel (`setup.py` puts them there), at the root of a checkout."""

from pathlib import Path


_PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """Where the recipes are.

    Raises:
        FileNotFoundError: if this installation has none.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("this installation of peft-steer has no recipes; install it again from its wheel")


def recipe_names() -> list[str]:
    """The names of all recipes: `smollm2-135m/sft/post_block`, `bench/quickstart`, ..."""
    folder = recipes_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe by its name (`smollm2-135m/sft/post_block`, with or without `recipes/` and `.yaml`). A file of the
    user's that has this path comes first; what is neither is returned as it is, for the caller to refuse."""
    given = Path(name)
    if given.is_file():
        return given
    shipped = recipes_folder() / f"{name.removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    return shipped if shipped.is_file() else given
