"""The HTML page of a report: well formed, from one file, headed by its environment."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from benchmarks.report.page import page
from benchmarks.report.style import SCALE, STEPS, step
from tests import made_up

VOID = {"meta", "img", "br", "input"}


class Structure(HTMLParser):
    """Every element and whether all were closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def parsed(html: str) -> Structure:
    structure = Structure()
    structure.feed(html)
    structure.close()
    assert structure.open == [], f"never closed: {structure.open}"
    return structure


@pytest.fixture(scope="module")
def html() -> str:
    gpu, cpu = made_up.run_of(made_up.gpu_results()), made_up.run_of(made_up.cpu_results())
    return page([(gpu, [("speed.png", b"not quite a picture")]), (cpu, [])])


def test_page_is_well_formed_and_fetches_nothing(html: str) -> None:
    structure = parsed(html)
    for tag, attributes in structure.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/png;base64,", "#")), attributes
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(", html)
    identities = [a["id"] for _, a in structure.elements if "id" in a]
    assert len(identities) == len(set(identities))
    links = [a["href"][1:] for tag, a in structure.elements if tag == "a"]
    assert links and set(links) <= set(identities)


def test_page_is_headed_by_its_environment(html: str) -> None:
    heading = html[html.index("<h1>") : html.index("</h1>")]
    assert "GPU: Made-up H100" in heading and "CPU: Made-up processor" in heading
    for run in (made_up.run_of(made_up.gpu_results()), made_up.run_of(made_up.cpu_results())):
        section = html[html.index(f"<section><h2>{run.title}</h2>") :]
        section = section[: section.index("<table")]
        e = run.environment
        for told in (e.commit[:10], e.torch, e.triton, e.python, e.timestamp, "GB/s"):
            assert told in section
        assert ("with uncommitted changes" in section) == e.dirty
        assert ("Measured on a CPU" in section) == e.on_cpu
        assert (f"driver {e.driver}, CUDA {e.cuda}" in section) == (not e.on_cpu)


def test_losses_have_the_colours_of_wins_mirrored() -> None:
    for edge in STEPS[5:]:
        assert step(edge) + step(1 / edge) == len(SCALE) - 1 and step(edge) > 5
    assert (step(1.0), step(0.99), step(3.0), step(0.2)) == (5, 5, 10, 0)
    html = page([(made_up.run_of(made_up.small_results()), [])])
    parsed(html)
    assert f".s0 {{ background: {SCALE[0]}" in html and f".s10 {{ background: {SCALE[10]}" in html
    assert re.search(r'<td class="s10"[^>]*>▲ 2.00x torch.compile</td>', html)
    assert re.search(r'<td class="s0"[^>]*>▼ 0.50x torch</td>', html)
    assert re.search(r'<td class="s4"[^>]*>≈ 0.95x torch</td>', html)
    assert re.search(r'<td class="s0"[^>]*>0.50x torch</td>', html), "of the summary"
    assert html.count('data-lost="1"') == 1  # what the box "only where fastnorm is slower" keeps


def test_page_escapes_what_a_file_says() -> None:
    results = made_up.small_results()
    results.rows[-2].note = '<script>alert("no")</script>'
    html = page([(made_up.run_of(results), [])])
    parsed(html)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
