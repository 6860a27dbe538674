import json
import math
import re
from pathlib import Path

from litdiffusion.reporting.page import TEMPLATE, write_page

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 {{title}}"
EXTERNAL = re.compile(
    r"""https?:|//[\w-]+\.\w|@import|\burl\(|\bsrc\s*=\s*["']|\bfetch\(|XMLHttpRequest|<link"""
)


def test_nothing_in_the_page_is_fetched() -> None:
    """Each picture is a data URI, set by the script; the browser itself refuses all else."""
    text = TEMPLATE.read_text(encoding="utf-8").replace(
        "http://www.w3.org/2000/svg", ""
    )  # a name, no address
    assert EXTERNAL.findall(text) == []
    assert "default-src 'none'; img-src data:;" in text
    assert "innerHTML" not in text


def test_what_a_run_says_stays_text(tmp_path: Path) -> None:
    write_page(
        tmp_path / "a.html", HOSTILE, {"runs": [{"name": HOSTILE, "loss": math.nan, "t": (1, math.inf)}]}
    )
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    plain = TEMPLATE.read_text(encoding="utf-8")
    for mark in ("<script", "</script", "<!--"):
        assert text.count(mark) == plain.count(mark)
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data == {"title": HOSTILE, "runs": [{"name": HOSTILE, "loss": None, "t": [1, None]}]}
