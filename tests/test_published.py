"""Published speeds: the bytes follow from a config, the page in the docs is what the command prints, and what lies outside says why."""

from pathlib import Path

import pytest

from k2.__main__ import main
from k2.published import REPORTS, gigabytes, is_between, limit, page

DOCS = Path(__file__).resolve().parent.parent / "lessons" / "experiments" / "published_speeds.md"


def test_the_page_in_the_docs_is_what_the_command_prints(capfd):
    assert main(["plan", "--published"]) == 0
    assert capfd.readouterr().out == page() == DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("moves, bits, expected", [("V3 routed", 4.85, 12.4), ("K2 routed", 4.85, 12.8), ("K2 routed", 4.5, 11.9), ("K2 routed", 8.0, 21.1), ("K2 all", 2.9, 11.5), ("K2 all", 4.57, 18.1), (3.1, 4.0, 3.1)])
def test_the_bytes_of_a_token_are_those_that_the_reports_imply(moves, bits, expected):
    assert round(gigabytes(REPORTS[0]._replace(moves=moves, bits=bits)), 1) == expected


def test_every_report_lies_between_its_lines_or_says_why_not():
    outside = [report for report in REPORTS if not is_between(report)]
    assert [report.source for report in outside] == ["llama.cpp, measured by ktransformers"]
    assert all(report.why.startswith("BELOW: ") for report in outside) and not any(r.why.startswith("BELOW") for r in REPORTS if is_between(r))
    one_socket = outside[0]._replace(bandwidth=307)
    assert is_between(one_socket) and f"it is {one_socket.reported / limit(one_socket) * 100:.0f} %" in outside[0].why
    assert f"{len(REPORTS) - 1} of {len(REPORTS)} lie between" in page()


def test_every_row_has_its_reason_and_its_source():
    rows = [line for line in page().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(REPORTS) and all(len(row.strip("| ").split(" | ")) == 10 and report.why for row, report in zip(rows, REPORTS))
