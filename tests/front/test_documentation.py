"""The README is short and runs as written; the documentation has every public name, command and page."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_steer
from peft_steer_cli.main import COMMANDS


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in (ROOT / "README.md", *PAGES)
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_the_readme_is_read_in_a_minute():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 900


def test_links_of_the_readme_are_absolute():
    """It is shown on package indexes, too, which know none of our files."""
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    assert all(target.startswith("https://") for target in targets)


def test_links_of_the_readme_to_pages_and_files_exist():
    for path in re.findall(r"peft-steer\.github\.io/peft-steer/([\w/-]*)", README):
        page = ROOT / "docs" / path.strip("/")
        assert any(p.is_file() for p in (page.with_suffix(".md"), page / "index.md", page / "README.md")), path
    for path in re.findall(r"peft-steer/peft-steer/(?:blob|raw)/main/([\w/.-]+)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_are_python(block):
    compile(block, "block", "exec")


@pytest.mark.slow
def test_the_readme_runs_as_written(tiny_llama, tmp_path):
    """Its program, in a process of its own, with the tiny model in the place of the hub's."""
    base = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    shutil.copytree(tiny_llama, base)
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "readme.py").write_text(program)
    result = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1].startswith("max(3,4,min(2,9))=")
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"^::: peft_steer\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert named == set(peft_steer.__all__)


def test_every_command_is_in_the_readme_and_has_a_line():
    page = (ROOT / "docs" / "commands.md").read_text()
    for name in COMMANDS:
        assert re.search(rf"`(peft-steer )?{name}\b", README), name
        assert re.search(rf"`(peft-steer )?{name}\b", page), name


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    listed = set(re.findall(r"[\w/-]+\.md", nav))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES}


def test_messages_in_troubleshooting_are_still_raised():
    """Each message quotes words of the sources (or of PEFT's `KeyError`); `…` stands for a value."""
    source = "".join(p.read_text() for p in (ROOT / "peft_steer").rglob("*.py"))
    joined = re.sub(r'"\s*\+?\s*f?"', "", source)  # strings that are split over lines
    rows = re.findall(r"^\| (?!Message|---|`KeyError)(.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 80
    squeezed = re.sub(r"[`'\"]", "", joined)
    for row in rows:
        parts = [part.strip(" ='`") for part in re.split(r"…", row)]
        for words in (re.sub(r"[`'\"]", "", part) for part in parts):
            assert words in squeezed, row


def test_the_citation_has_the_version_of_the_package():
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_files_that_pages_name_exist():
    for page in (ROOT / "README.md", *PAGES):
        for path in re.findall(
            r"(?<![\w/])((?:tests|recipes|peft_steer|examples)/[\w./-]+\.(?:py|yaml|ipynb))", page.read_text()
        ):
            assert "NAME" in path or (ROOT / path).is_file(), f"{page.name}: {path}"
