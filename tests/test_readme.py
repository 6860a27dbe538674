"""The README speaks of what there is."""

import re
from pathlib import Path

from litdiffusion.configuration import config_folder

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table whose first column is so called."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_group_of_the_configuration_is_in_the_table_and_in_the_tree() -> None:
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    assert {name for row in table("group") for name in re.findall(r"`(\w+)`", row[0])} == groups
    tree = README[README.index("configs/\n") :].partition("```")[0]
    assert set(re.findall(r"(\w+)/", tree)) - {"configs"} == groups


def test_its_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (root / link).exists()] == []
