"""A report as one HTML file that needs no network: ``report.html`` of this package, with the data in it."""

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litdiffusion.reporting.found import Found
from litdiffusion.reporting.gather import gather
from litdiffusion.runs.folder import RunFolder
from litdiffusion.system.files import write_text

TEMPLATE = Path(__file__).with_name("report.html")


def write_page(path: Path, title: str, data: Mapping[str, Any]) -> None:
    """Write a report of what ``gather`` has found, whole or not at all."""
    text = json.dumps({"title": title, **_finite(data)}, allow_nan=False, separators=(",", ":"))
    # Nothing that a run holds may end the element that it stands in.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    filled = {"{{title}}": html.escape(title), "{{data}}": text}
    page = re.sub(r"{{\w+}}", lambda found: filled[found[0]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, page)


def write_run_page(folder: RunFolder) -> None:
    """Write the report of one run into its folder."""
    write_page(folder.report, "/".join(folder.path.parts[-2:]), gather([Found(folder.path)]))


def _finite(value: Any) -> Any:
    """Return plain values with null for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
