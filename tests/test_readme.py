"""The README's commands: targets that exist, with variables that they take."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HELP = dict(re.findall(r"^([a-z0-9-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = re.findall(r"^make ([a-z0-9-]+)([^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("target", "variables"), COMMANDS, ids=[f"{t}{v}".strip() for t, v in COMMANDS])
def test_target_takes_the_variables(target: str, variables: str) -> None:
    assert target in HELP
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]*)=", variables))
    assert named <= set(re.findall(r"\b([A-Z][A-Z0-9_]*)\b", HELP[target].partition("[")[2]))


def test_every_target_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [target for target in HELP if target != "help" and f"make {target}" not in readme]
