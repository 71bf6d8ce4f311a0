"""What is built and installed runs with its recipes, away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment with our wheel, made of our sdist, and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copied = (
        "peft_steer*",
        "lm_eval_tasks",
        "recipes",
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    )
    source.mkdir()
    for pattern in copied:
        for path in ROOT.glob(pattern):
            if path.suffix != ".egg-info":
                subprocess.run(["cp", "-r", str(path), str(source)], check=True)
    build = "from setuptools.build_meta import {0}; print({0}({1!r}))"
    for what in ("build_sdist", "build_wheel"):
        subprocess.run([sys.executable, "-c", build.format(what, str(folder))], cwd=source, check=True, timeout=300)
    sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
    assert (
        "recipes/smollm2-135m/sft/post_block.yaml"
        in subprocess.run(["tar", "-tf", str(sdist)], capture_output=True, text=True, check=True).stdout
    )
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    packages = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    # Plain paths alone: the editable installs of this environment are not followed.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = [str(python.parent / "peft-steer"), *arguments]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="looks for bin/python")
def test_the_wheel_runs_its_recipes(installed, tmp_path, tiny_llama):
    listed = run(installed, "recipes", folder=tmp_path)
    assert "smollm2-135m/sft/post_block" in listed.stdout, listed.stderr
    assert "bench/quickstart" in listed.stdout
    assert run(installed, "recipes", "copy", "smollm2-135m/sft/post_block", folder=tmp_path).returncode == 0
    original = ROOT / "recipes" / "smollm2-135m" / "sft" / "post_block.yaml"
    assert (tmp_path / "post_block.yaml").read_text() == original.read_text()
    again = run(installed, "recipes", "copy", "smollm2-135m/sft/post_block", folder=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    missing = run(installed, "recipes", "copy", "smollm2-135m/sft/post_blok", folder=tmp_path)
    assert "did you mean 'smollm2-135m/sft/post_block'" in missing.stderr
    options = ["--model_name_or_path", tiny_llama, "--max_steps", "1", "--per_device_train_batch_size", "2"]
    trained = run(
        installed, "sft", "--config", "smollm2-135m/sft/post_block", *options, "--output_dir", "out", folder=tmp_path
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "Warning" not in trained.stderr  # of libraries about their own code
    assert "kernels-community" not in trained.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
