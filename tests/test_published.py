"""Published speeds: the bytes follow from a config, the page in the docs is what the command prints, and what lies outside says why."""

from pathlib import Path

import pytest

from k2.__main__ import main
from k2.needs import family_config
from k2.plan import plan
from k2.published import REPORTS, is_between, limit, machine_of, needs_of, page, seconds, slowest

DOCS = Path(__file__).resolve().parent.parent / "lessons" / "experiments" / "published_speeds.md"


def test_the_page_in_the_docs_is_what_the_command_prints(capfd):
    assert main(["plan", "--published"]) == 0
    assert capfd.readouterr().out == page() == DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(("model", "bits", "expected"), [("V3", 4.85, 12.4), ("K2", 4.85, 12.8), ("K2", 4.5, 11.9), ("K2", 8.0, 21.1), (3.1, 4.0, 3.1)])
def test_the_routed_bytes_of_a_token_are_those_that_the_reports_imply(model, bits, expected):
    assert round(needs_of(REPORTS[0]._replace(model=model, bits=bits)).routed / 1e9, 1) == expected


def test_a_report_without_a_card_reads_all_active_weights_from_ram_and_one_with_a_card_its_routed_ones():
    bare = next(r for r in REPORTS if r.name == "K2.5 Q4_K_S")
    assert slowest(bare)[0] == "RAM, theory" and round(slowest(bare)[2], 1) == 18.1
    carded = next(r for r in REPORTS if r.name == "K2 Q4_K_M")
    share = seconds(carded).gpu_share
    assert 0.02 < share < 0.05 and round(slowest(carded)[2], 2) == round((1 - share) * needs_of(carded).routed / 1e9, 2)
    swift = next(r for r in REPORTS if r.bandwidth == 1229)
    assert slowest(swift)[:2] == ("the card, theory", 1008)


def test_the_line_of_a_report_is_what_plan_gives_for_its_machine():
    config, machine = family_config("thinking"), machine_of(next(r for r in REPORTS if r.name == "K2-Thinking INT4"))
    planned = plan("thinking", config, machine, measure=False)
    as_released = 1 / planned.seconds.limit
    assert abs(limit(next(r for r in REPORTS if r.name == "K2-Thinking INT4")) / as_released - 1) < 0.15, "4.5 bits for all weights, beside INT4 with the rest in bf16"


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
