"""Run PEFT's own model tests, of the installed version, with this project's configurations.

    python tests/peft_suite/run.py                        # the steering configurations
    python tests/peft_suite/run.py --method joint         # JointSteerLoraConfig in LoRA's place
    python tests/peft_suite/run.py --method lora          # PEFT's LoRA itself: the baseline of this machinery
    python tests/peft_suite/run.py -k test_merge_layers   # anything else goes to pytest

The tests come from PEFT's source distribution, which pip fetches once into the cache (`--cache`), and the models that
they take from the Hub are built there too. `plugin.py` puts our configurations into the tests' parametrization;
`cases.py` says which, `expected.py` lists every test that has to be refused or does not apply, with its reason.
Exit status: pytest's, so 0 only without an unexpected failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = {"pytest": "pytest", "diffusers": "diffusers", "parameterized": "parameterized", "scipy": "scipy"}
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft-steer" / "peft-suite"


def fetch_tests(cache: Path) -> Path:
    """Download and unpack the source distribution of the installed PEFT; return its root, the parent of `tests`."""
    name = f"peft-{version('peft')}"
    root = cache / name
    package = root / "tests" / "__init__.py"
    if not package.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--dest", str(cache), f"peft=={version('peft')}"], check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
        package.touch()  # the source distribution lacks it, and the tests import each other relatively
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["steer", "joint", "lora", "beft"], default="steer")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args, pytest_args = parser.parse_known_args()

    missing = [name for module, name in REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"PEFT's tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    args.cache.mkdir(parents=True, exist_ok=True)
    root = fetch_tests(args.cache.resolve())

    hub = args.cache.resolve() / f"hub-transformers-{version('transformers')}"
    sys.path.insert(0, str(HERE))
    import hub as local_hub

    local_hub.build(hub)

    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH")])),
    }
    # Without PEFT's own options: they measure coverage of its sources, and turn transformers' deprecation warnings
    # into errors, which PEFT's own code fails on with a newer transformers.
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "plugin", "--method", args.method, "-q", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, *pytest_args]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
