"""The recipes are at the root of the repository and inside the package of a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("recipes", str(Path(self.build_lib) / "peft_steer" / "recipes"))


setup(cmdclass={"build_py": BuildWithRecipes})
