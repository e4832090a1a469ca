"""The commands that docs/video.md shows are commands of this version, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from llama_smop.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "video.md"
COMMANDS = re.findall(
    r"^    (?:llama-smop|torchrun .* -m llama_smop\.cli) (.*)$", PAGE.read_text().replace("\\\n", ""), re.M
)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line):
    name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    if hasattr(command, "commands"):  # a group, as `corpus crop`
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)  # raises what the command line would print


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert len(links) >= 4 and len(COMMANDS) >= 6
    missing = [link for link in links if not (PAGE.parent / link).exists()]
    assert not missing, f"dead links in docs/video.md: {missing}"
