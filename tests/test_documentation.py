# SPDX-License-Identifier: Apache-2.0

"""What the documentation tells to type: the `anomalib` command accepts it."""

import re
import shlex
from pathlib import Path

import pytest
from anomalib.cli.cli import AnomalibCLI

from tests.helpers import REPOSITORY

READMES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]
DOCUMENTS = [*READMES, REPOSITORY / "RESULTS.md", *sorted(REPOSITORY.glob("configs/*.yaml"))]


def code(path: Path, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Arguments of each `anomalib` command, as they stand in the READMEs."""
    blocks = "\n".join(block for path in READMES for block in code(path, "bash"))
    lines = blocks.replace("\\\n", "").replace(" && ", "\n")
    return re.findall(r"^(?:\.venv/bin/)?anomalib ((?:train|test|predict|export) .*)", lines, flags=re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_one_form_of_arguments(path: Path) -> None:
    """`--model.<argument>`, which the command takes wherever it takes `--model.init_args.<argument>`."""
    assert not re.findall(r"--\w+\.init_args\S*", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its arguments are known and of the right type; with `--print_config` it does no more than read them."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command.replace("<your config>", "configs/spg_textures.yaml"))
    with pytest.raises(SystemExit) as done:
        AnomalibCLI(args=[*words, "--print_config"])
    assert done.value.code == 0, capsys.readouterr().err
